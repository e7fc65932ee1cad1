// The result row_max of decode (cuda/row_max.cuh), to which every part of a sequence adds its own.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/score.h"
#include "cuda/decode/partition.cuh"
#include "cuda/ordered.cuh"
#include "cuda/ptx/atomic.cuh"

namespace jax_flash::decode {

// Raises a row's result to `top`, the largest of some of its scores in powers of two.
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

// The same of a warp's rows, from `first_row` on, of S in mma's C.
template <class S>
__device__ __forceinline__ void raise_row_maxima(const DecodeCall& call, const ColumnRows& rows,
                                                 const SequenceWork& work, int32_t first_row, const S& s) {
#pragma unroll
  for (int slot = 0; slot < S::kSlots; ++slot) {
    float top = s.at(slot, 0, 0);
#pragma unroll
    for (int i = 1; i < 2 * S::kColumnTiles; ++i) top = fmaxf(top, s.at(slot, i / 2, i % 2));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
    if (threadIdx.x % 4 == 0) raise_row_max(call, rows, work, first_row + S::row(slot), top);
  }
}

}  // namespace jax_flash::decode
