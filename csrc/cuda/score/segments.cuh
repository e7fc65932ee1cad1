// Segments: S ← −inf where key and row have different segments.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/band.h"
#include "cuda/score/operands.cuh"

namespace jax_flash {

// a, b: the segments of the row and the key.
__device__ __forceinline__ void hide_other_segment(float& x, int32_t a, int32_t b) {
  if (a != b) x = -INFINITY;
}

// The same for a transposed S. A lane has few keys but too many rows to hold all of their segments in
// registers, so the lanes divide the rows' segments.
template <class S>
__device__ __forceinline__ void hide_other_segments_transposed(S& s, const SegmentOperands& operands,
                                                               const Band& band, int32_t row, int32_t key) {
  const int32_t lane = ptx::thread_index() % 32;
  int32_t of_key[S::kColumnTiles][2], of_row[(S::kRows + 31) / 32];
#pragma unroll
  for (int n = 0; n < S::kColumnTiles; ++n)
#pragma unroll
    for (int e = 0; e < 2; ++e)
      of_key[n][e] = operands.kv_segments[min(key + S::column(n, e), band.k_len - 1)];
#pragma unroll
  for (int i = 0; i < S::kRows; i += 32)
    of_row[i / 32] = operands.q_segments[min(row + i + lane, band.q_len - 1)];
#pragma unroll
  for (int slot = 0; slot < S::kSlots; ++slot) {
    const int i = S::row_step(slot);
    const int32_t segment = __shfl_sync(~0u, of_row[i / 32], i % 32 + lane % 4 * 2);
#pragma unroll
    for (int n = 0; n < S::kColumnTiles; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) hide_other_segment(s.at(slot, n, e), segment, of_key[n][e]);
  }
}

// For segments in global memory.
template <class S>
__device__ __forceinline__ void hide_other_segments(S& s, const SegmentOperands& operands, const Band& band,
                                                    int32_t row, int32_t key) {
  if constexpr (S::kTransposed) {
    hide_other_segments_transposed(s, operands, band, row, key);
  } else {
#pragma unroll
    for (int n = 0; n < S::kColumnTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int32_t j = key + S::column(n, e);
        const int32_t segment = j < band.k_len ? operands.kv_segments[j] : 0;
#pragma unroll
        for (int slot = 0; slot < S::kSlots; ++slot) {
          const int32_t i = row + S::row(slot);
          if (i < band.q_len && j < band.k_len)
            hide_other_segment(s.at(slot, n, e), operands.q_segments[i], segment);
        }
      }
    }
  }
}

}  // namespace jax_flash
