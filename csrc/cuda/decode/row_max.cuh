// The result row_max of decode (cuda/row_max.cuh). Every part of a sequence raises it to its own maximum.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/score.h"
#include "cuda/decode/partition.cuh"
#include "cuda/ordered.cuh"
#include "cuda/ptx/atomic.cuh"
#include "cuda/softmax.cuh"

namespace jax_flash::decode {

// Raises a row's result to `top`, the largest of some of its scores, times log2(e).
__device__ __forceinline__ void raise_row_max(const DecodeCall& call, const ColumnRows& rows,
                                              const SequenceWork& work, int32_t row, float top) {
  if (row >= rows.count() || !(top > -INFINITY)) return;
  const int32_t i = rows.position(row);
  if (i >= work.band.q_len) return;
  DecodeView at = call.lse;
  at.data = call.row_max;
  ptx::raise(at.at<uint32_t>(work.leading, work.batch_row, rows.head(row), work.q_begin + i),
             ordered(top * kLn2));
}

// Likewise for a warp's rows from `first_row` on, from S in mma's C layout.
template <class S>
__device__ __forceinline__ void raise_row_maxima(const DecodeCall& call, const ColumnRows& rows,
                                                 const SequenceWork& work, int32_t first_row, const S& s) {
#pragma unroll
  for (int slot = 0; slot < S::kSlots; ++slot) {
    const float top = row_max(thread_max(s, slot));
    if (threadIdx.x % 4 == 0) raise_row_max(call, rows, work, first_row + S::row(slot), top);
  }
}

}  // namespace jax_flash::decode
