// The location of the operands of one head's scores.
#pragma once

#include <cstdint>

#include "core/band.h"
#include "core/plan/launch_plan.h"
#include "core/problem.h"
#include "core/visible/blocks.h"
#include "core/visible/elements.h"
#include "core/visible/ranges.h"
#include "cuda/score/dropout.cuh"
#include "cuda/score/mask_bits.cuh"
#include "cuda/work.cuh"

namespace jax_flash {

// Whether the keys of a tile belong to the rows' own segment: all do, none does, or it is not known.
enum class InSegment { kAll, kNone, kSome };

__device__ __forceinline__ float alibi_slope(const View& slopes, int64_t leading_offset,
                                             const BlockWork& work, int32_t query_head) {
  return slopes.as<const float>()[leading_offset + slopes.offset(work.tile.index, query_head, 0)];
}

// The score operands of kernels for segments, which all heads share.
struct SegmentOperands {
  const int32_t *q_segments = nullptr, *kv_segments = nullptr;

  // Finds what a score variant reads().
  template <class Score>
  __device__ __forceinline__ void prepare(const Problem& p, const BlockWork& work, int32_t query_head) {
    auto rows = [&](const View& ids) { return ids.as<const int32_t>() + work.offset(p, ids, query_head, 0); };
    if (Score::reads(Operand::kQSegmentIds) && p.q_segment_ids) q_segments = rows(p.q_segment_ids);
    if (Score::reads(Operand::kKvSegmentIds) && p.kv_segment_ids) kv_segments = rows(p.kv_segment_ids);
  }
  template <class Score>
  __device__ __forceinline__ const SegmentOperands& of_head(const Problem&, const BlockWork&, int32_t) const {
    return *this;
  }
};

// The score operands of kernels for ranges.
struct RangeOperands {
  const int32_t* ranges = nullptr;      // ranges of the first row
  const SeenByBlock* blocks = nullptr;  // blocks of the sequence's rows

  template <class Score>
  __device__ __forceinline__ void prepare(const Problem& p, const BlockWork& work, int32_t query_head) {
    if (work.tile.index == kNoSequence) return;
    ranges = p.ranges.as<const int32_t>() + work.offset(p, p.ranges, query_head, work.tile.q_begin);
  }
  // The ranges of the rows at the first head + `further`.
  __device__ __forceinline__ RowRanges row_ranges(const Problem& p, int32_t further) const {
    return {ranges + further * p.ranges.head, 0, p.ranges.row, p.limits == 4};
  }
};

// The block mask of a head that begins at `first`, in calls without a position.
__device__ __forceinline__ BlockMask block_mask_from(const Problem& p, const uint8_t* first) {
  return {first, 0, p.block_mask.row, p.mask_rows, p.mask_columns, p.spec.block_rows, p.spec.block_keys};
}

// The mask of a head that begins at `first`.
__device__ __forceinline__ MaskRows mask_rows_from(const Problem& p, const uint8_t* first) {
  return {first, p.mask.row, p.mask.column, p.k_rows};
}

// The score operands of kernels that read one mask alone; kFrom returns the mask of a head.
template <View Problem::* kMask, auto kFrom>
struct OneMaskOperands {
  const uint8_t* first = nullptr;  // of the first head

  template <class Score>
  __device__ __forceinline__ void prepare(const Problem& p, const BlockWork& work, int32_t query_head) {
    first = (p.*kMask).template as<const uint8_t>() + work.offset(p, p.*kMask, query_head, 0);
  }
  // The mask of the `further`-th head after the first.
  __device__ __forceinline__ auto mask(const Problem& p, int32_t further) const {
    return kFrom(p, first + further * (p.*kMask).head);
  }
};
using BlockOperands = OneMaskOperands<&Problem::block_mask, block_mask_from>;
using MaskOperands = OneMaskOperands<&Problem::mask, mask_rows_from>;

// The operands of one head's scores: pointers to its part, and scalars by value.
struct ScoreOperands : SegmentOperands {
  const void* bias = nullptr;
  const uint8_t *mask = nullptr, *draft = nullptr;
  const int32_t* ranges = nullptr;       // ranges of the first row
  const uint8_t* blocks = nullptr;       // [block of rows, block of keys]: whether the rows see the keys
  int32_t first_row = 0, first_key = 0;  // positions in the sequence at which the blocks begin
  float slope = 0;
  uint32_t batch = 0, head = 0;  // indices in dropout's counter
  Dropout dropout;

  template <class Score>
  __device__ __forceinline__ void prepare(const Problem& p, const BlockWork& work, int32_t query_head) {
    if (work.tile.index == kNoSequence) return;
    SegmentOperands::prepare<Score>(p, work, query_head);
    auto offset = [&](const View& view) { return work.offset(p, view, query_head, 0); };
    if (Score::reads(Operand::kBias) && p.bias)
      bias = p.bias.as<const uint8_t>() + offset(p.bias) * (p.bias_dtype == DType::kF32 ? 4 : 2);
    if (Score::reads(Operand::kMask) && p.mask) mask = p.mask.as<const uint8_t>() + offset(p.mask);
    if constexpr (Score::reads(Operand::kDraftMask)) {
      draft = nullptr;  // the tile before may have set it for another sequence
      if (p.draft_mask && has_drafts(work.tile.q_len, p.draft_rows))
        draft = p.draft_mask.as<const uint8_t>() + p.draft_mask.leading_offset(p.leading, work.leading) +
                p.draft_mask.offset(work.tile.index, 0, 0);
    }
    if (Score::reads(Operand::kRanges) && p.ranges)
      ranges = p.ranges.as<const int32_t>() + work.offset(p, p.ranges, query_head, work.tile.q_begin);
    if (Score::reads(Operand::kBlockMask) && p.block_mask) {
      const BlockMask mask = block_mask_of(p, work.leading, work.sequence(), query_head);
      blocks = mask.seen, first_row = mask.first_row, first_key = mask.first_key;
    }
    if (Score::reads(Operand::kAlibiSlopes) && p.alibi_slopes)
      slope = alibi_slope(p.alibi_slopes, p.alibi_slopes.leading_offset(p.leading, work.leading), work,
                          query_head);
    if constexpr (Score::reads(Operand::kDropout)) {
      if (p.dropout)
        dropout = make_dropout(p.spec, p.dropout, p.dropout.leading_offset(p.leading, work.leading));
      batch = static_cast<uint32_t>(work.tile.index), head = static_cast<uint32_t>(query_head);
    }
  }

  // The operands of the head `further` heads after this one. There is at most one leading dimension.
  template <class Score>
  __device__ __forceinline__ ScoreOperands of_head(const Problem& p, const BlockWork& work,
                                                   int32_t further) const {
    ScoreOperands x = *this;
    x.bias =
        static_cast<const uint8_t*>(bias) + further * p.bias.head * (p.bias_dtype == DType::kF32 ? 4 : 2);
    x.mask = mask + further * p.mask.head;
    if (Score::reads(Operand::kRanges)) x.ranges = ranges + further * p.ranges.head;
    if (Score::reads(Operand::kBlockMask)) x.blocks = blocks + further * p.block_mask.head;
    if (Score::reads(Operand::kAlibiSlopes) && p.alibi_slopes)
      x.slope =
          alibi_slope(p.alibi_slopes, work.leading * p.alibi_slopes.leading[0], work, work.head + further);
    x.head = head + static_cast<uint32_t>(further);
    return x;
  }

  // The ranges of the rows.
  __device__ __forceinline__ RowRanges row_ranges(const Problem& p) const {
    return {ranges, 0, p.ranges.row, p.limits == 4};
  }

  __device__ __forceinline__ BlockMask block_mask(const Problem& p) const {
    return {blocks,         p.block_mask.head, p.block_mask.row,  p.mask_rows,
            p.mask_columns, p.spec.block_rows, p.spec.block_keys, first_row,
            first_key};
  }

  // Whether block masks hide all of `keys` from all of `rows`, at the head `further` heads after this one.
  __device__ __forceinline__ bool blocks_hide(const Problem& p, int32_t further, const Interval& rows,
                                              const Interval& keys) const {
    return p.block_mask && !block_mask(p).any_sees(further, rows, keys);
  }

  __device__ __forceinline__ TileDropout dropout_at(int32_t row, int32_t key) const {
    return {dropout, batch, head, row, key};
  }

  // Whether a 16-bit bias can be loaded by pairs of elements, at even keys.
  __device__ __forceinline__ bool bias_in_pairs(const Problem& p) const {
    return p.bias_dtype != DType::kF32 && p.bias.column == 1 && p.bias.row % 2 == 0 && p.k_rows % 2 == 0 &&
           reinterpret_cast<uintptr_t>(bias) % 4 == 0;
  }

  // Whether a 16-bit bias can be loaded by 16 bytes, at keys that are multiples of 8.
  __device__ __forceinline__ bool bias_in_chunks(const Problem& p) const {
    return p.bias_dtype != DType::kF32 && p.bias.column == 1 && p.bias.row % 8 == 0 && p.k_rows % 8 == 0 &&
           reinterpret_cast<uintptr_t>(bias) % 16 == 0;
  }
};

// The Tile of a score variant for warps whose rows belong to one head. The warp's part of S begins at query
// first_row and key `key` of the sequence. T: the call's dtype.
template <class T, class Operands>
struct ScoreTile {
  using Element = T;
  const Problem& p;
  const Operands& score;
  const Band& visible;
  int32_t first_row, key;

  __device__ __forceinline__ const Operands& operands() const { return score; }
  __device__ __forceinline__ const Band& band() const { return visible; }
  __device__ __forceinline__ int32_t row() const { return first_row; }
};

// f(x, the operand's element) for every element x of S whose row and key are in use. The operand is
// [s_q, s_k], broadcast by zero strides.
template <class T, class S, class F>
__device__ __forceinline__ void for_each_used(S& s, const void* operand, const View& view, const Band& band,
                                              int32_t row, int32_t key, F f) {
  const auto column = static_cast<int32_t>(view.column);
#pragma unroll
  for (int slot = 0; slot < S::kSlots; ++slot) {
    const int32_t i = row + S::row(slot), end = i < band.q_len ? band.k_len : 0;
    const T* from = static_cast<const T*>(operand) + i * view.row;
#pragma unroll
    for (int n = 0; n < S::kColumnTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int32_t j = key + S::column(n, e);
        if (j < end) f(s.at(slot, n, e), from[j * column]);
      }
    }
  }
}

}  // namespace jax_flash
