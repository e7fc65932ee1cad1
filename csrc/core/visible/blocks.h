// The operand `block_mask`, which says which blocks of keys each block of query rows sees. A boolean mask
// beside packed keys or pages is one, too: its blocks are single rows and keys, or all of a sequence's where
// it broadcasts them.
#pragma once

#include "../band.h"

namespace jax_flash {

inline constexpr int32_t kLeastBlock = 16;  // block sizes are multiples of this, or 1

constexpr bool is_block_size(int32_t size) { return size == 1 || (size > 0 && size % kLeastBlock == 0); }

// How much of a set of keys a set of rows sees.
enum class SeenPiece : int32_t { kAll = 0, kNone = 1, kSome = 2 };

JF_HD SeenPiece seen_piece_of(bool any, bool all) {
  return !any ? SeenPiece::kNone : all ? SeenPiece::kAll : SeenPiece::kSome;
}

// How much some rows see of some keys. `rows`, `columns`: the blocks in which these rows and keys lie;
// sees(row, column): how much a block of rows sees of a block of keys.
template <class Sees>
JF_HD SeenPiece seen_in(const Interval& rows, const Interval& columns, Sees sees) {
  bool any = false, all = true;
  for (int32_t row = rows.lo; row < rows.hi; ++row)
    for (int32_t column = columns.lo; column < columns.hi; ++column) {
      const SeenPiece own = sees(row, column);
      any |= own != SeenPiece::kNone, all &= own == SeenPiece::kAll;
    }
  return seen_piece_of(any, all);
}

// The block mask of one sequence, from one head on. Rows past the last block see no key, and no row sees keys
// past the last block. In a packed batch blocks of one row belong to the packed rows, others to a sequence.
struct BlockMask {
  const uint8_t* seen = nullptr;  // [block of rows, block of keys]; null: hides nothing
  int64_t head = 0, row = 0;      // strides, in elements
  int32_t rows = 0, columns = 0;  // blocks
  int32_t block_rows = 1, block_keys = 1;
  int32_t first_row = 0, first_key = 0;  // positions in the sequence where the blocks begin

  JF_HD explicit operator bool() const { return seen != nullptr; }

  // The positions of the sequence's first row and key in a larger sequence, whose blocks these are.
  JF_HD void begin_at(int32_t row, int32_t key) {
    constexpr int32_t kMost = 1 << 30;  // sums with rows and keys fit, and none is negative
    first_row = clamp_index(row, kMost), first_key = clamp_index(key, kMost);
  }
  JF_HD bool sees_block(int32_t h, int32_t at, int32_t column) const {
    return at < rows && column < columns && seen[h * head + at * row + column] != 0;
  }
  // How much of `keys` the rows of head h see, if the position is 0.
  JF_HD SeenPiece seen_of(int32_t h, const Interval& of_rows, const Interval& keys) const {
    return seen_in(tiles_of(of_rows, block_rows), tiles_of(keys, block_keys),
                   [&](int32_t at, int32_t column) {
                     return sees_block(h, at, column) ? SeenPiece::kAll : SeenPiece::kNone;
                   });
  }
  // Whether the blocks of head h let any of `rows` see any of `keys`; neither interval is empty. Single rows
  // and keys are not asked, because there are too many: a call with such blocks has ranges, too, which hide
  // the tiles before the first key and after the last. Unrolled loops would take registers from the kernels
  // that skip tiles by it.
  JF_HD bool any_sees(int32_t h, const Interval& rows, const Interval& keys) const {
    if (block_rows == 1 && block_keys == 1) return true;
#if defined(__CUDA_ARCH__)
#pragma unroll 1
#endif
    for (int32_t at = (rows.lo + first_row) / block_rows; at <= (rows.hi - 1 + first_row) / block_rows; ++at)
#if defined(__CUDA_ARCH__)
#pragma unroll 1
#endif
      for (int32_t j = (keys.lo + first_key) / block_keys; j <= (keys.hi - 1 + first_key) / block_keys; ++j)
        if (sees_block(h, at, j)) return true;
    return false;
  }
  JF_HD bool sees(int32_t h, int32_t i, int32_t j) const {
    return sees_block(h, (i + first_row) / block_rows, (j + first_key) / block_keys);
  }
};

// The blocks from query head `first` on.
JF_HD BlockMask block_mask_of(const Problem& p, int64_t leading, const Sequence& s, int32_t first) {
  const View& view = p.block_mask;
  if (!view) return {};
  const int64_t offset = view.leading_offset(p.leading, leading) + view.offset(s.index, first, 0);
  BlockMask mask{view.as<const uint8_t>() + offset,
                 view.head,
                 view.row,
                 p.mask_rows,
                 p.mask_columns,
                 p.spec.block_rows,
                 p.spec.block_keys};
  if (p.packed() && p.spec.block_rows == 1) mask.first_row = s.q_begin;
  if (const View& place = p.position) {
    const int32_t* first = place.as<const int32_t>() + place.leading_offset(p.leading, leading);
    mask.begin_at(first[0], first[place.column]);
  }
  return mask;
}

}  // namespace jax_flash
