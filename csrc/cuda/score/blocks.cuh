// The operand `block_mask`: S ← −inf if the row's block does not see the key's block.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/visible/blocks.h"

namespace jax_flash {

// S [rows from `row`, keys from `key`] ← −inf where blocks of single keys do not show the key. Eight elements
// are loaded at a time; more would take registers from calls with other masks.
template <class S>
__device__ __forceinline__ void hide_keys(S& s, const BlockMask& blocks, const Band& band, int32_t row,
                                          int32_t key) {
  constexpr int kColumns = 2 * S::kColumnTiles;
  static_assert(kColumns <= 32);
#pragma unroll
  for (int slot = 0; slot < S::kSlots; ++slot) {
    const int32_t i = row + S::row(slot), at = blocks.block_rows == 1 ? i + blocks.first_row : 0;
    const uint8_t* const seen = blocks.seen + at * blocks.row + blocks.first_key;
    const int32_t used = i < band.q_len ? band.k_len : 0;
    const int32_t end = at < blocks.rows ? min(used, blocks.columns - blocks.first_key) : 0;
    uint32_t hidden = 0;  // bit 2 n + e
#pragma unroll 8
    for (int c = 0; c < kColumns; ++c) {
      const int32_t j = key + S::column(c / 2, c % 2);
      const bool sees = j < end && seen[j];
      if (j < used && !sees) hidden |= 1u << c;
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
      if (hidden >> c & 1) s.at(slot, c / 2, c % 2) = -INFINITY;
  }
}

// S ← −inf in blocks of keys that the slot's row does not see. first: the position of the first key, counted
// from the first block; sees(slot, column): whether the row sees a block of keys. The loop over blocks is not
// unrolled, which takes the fewest registers.
template <class S, class Sees>
__device__ __forceinline__ void hide_blocks(S& s, int32_t first, int32_t block_keys, Sees sees) {
  const int32_t last = (first + S::kColumns - 1) / block_keys;
#pragma unroll 1
  for (int32_t column = first / block_keys; column <= last; ++column) {
    const int32_t lo = column * block_keys - first - S::column(0);
#pragma unroll
    for (int slot = 0; slot < S::kSlots; ++slot) {
      if (sees(slot, column)) continue;
#pragma unroll
      for (int n = 0; n < S::kColumnTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int step = S::column_step(n, e) - lo;
          if (0 <= step && step < block_keys) s.at(slot, n, e) = -INFINITY;
        }
      }
    }
  }
}

// S [rows from `row`, keys from `key`] ← −inf where blocks of any size do not show the key.
template <class S>
__device__ __forceinline__ void hide_outside_blocks(S& s, const BlockMask& blocks, const Band& band,
                                                    int32_t row, int32_t key) {
  if (blocks.block_keys == 1) return hide_keys(s, blocks, band, row, key);
  hide_blocks(s, key + blocks.first_key, blocks.block_keys, [&](int slot, int32_t column) {
    return blocks.sees_block(0, (row + S::row(slot) + blocks.first_row) / blocks.block_rows, column);
  });
}

}  // namespace jax_flash
