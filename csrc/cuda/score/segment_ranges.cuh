// Segments of whole tiles: whether all keys belong to the rows' own segment (sm_80 and newer).
#pragma once

#include <cstdint>

#include "core/band.h"
#include "core/problem.h"
#include "cuda/score/operands.cuh"

namespace jax_flash {

// The smallest and the largest segment of some rows or keys.
struct SegmentRange {
  int32_t lo, hi;

  // The range of x[0, count), 0 < count ≤ kMost. All lanes of the warp call it.
  template <int kMost>
  __device__ __forceinline__ static SegmentRange of(const int32_t* x, int32_t count) {
    const int32_t lane = threadIdx.x % 32;
    SegmentRange range{x[0], x[0]};
#pragma unroll
    for (int i = 0; i < kMost; i += 32) {
      const int32_t segment = x[min(i + lane, count - 1)];
      range.lo = min(range.lo, segment), range.hi = max(range.hi, segment);
    }
    return {__reduce_min_sync(~0u, range.lo), __reduce_max_sync(~0u, range.hi)};
  }
};

// Compares the segments of the rows and the keys of a tile of S, given the range of each.
__device__ __forceinline__ InSegment compare_ranges(const SegmentRange& rows, const SegmentRange& keys) {
  if (rows.hi < keys.lo || keys.hi < rows.lo) return InSegment::kNone;
  return rows.lo == rows.hi && keys.lo == keys.hi ? InSegment::kAll : InSegment::kSome;
}

// Likewise for the tile of S whose warp begins at query `row` and whose keys begin at `key`. All lanes of the
// warp call it.
template <class S>
__device__ __forceinline__ InSegment in_segment(const Problem& p, const SegmentOperands& operands,
                                                const Band& band, int32_t row, int32_t key) {
  if (!p.q_segment_ids || row >= band.q_len || key >= band.k_len) return InSegment::kAll;
  const auto rows = SegmentRange::of<S::kRows>(operands.q_segments + row, band.q_len - row);
  const auto keys = SegmentRange::of<S::kColumns>(operands.kv_segments + key, band.k_len - key);
  return compare_ranges(rows, keys);
}

// Likewise for a score variant; returns the kernel's own result if it has compared them before.
template <class S, class Tile>
__device__ __forceinline__ InSegment in_segment_of(const Tile& tile) {
  if constexpr (requires { tile.in_segment(); }) {
    return tile.in_segment();
  } else {
    return in_segment<S>(tile.p, tile.operands(), tile.band(), tile.row(), tile.key);
  }
}

}  // namespace jax_flash
