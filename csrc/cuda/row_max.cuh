// The result row_max in the form that kernels compute: integers with the order of the scores, or 0 if there
// is none. They are cleared before the kernels, and JAX converts them to floats (jax_flash/largest.py).
#pragma once

#include <cmath>
#include <cstdint>

#include "core/problem.h"
#include "core/score.h"
#include "cuda/epilogue.cuh"
#include "cuda/ordered.cuh"
#include "cuda/ptx/atomic.cuh"
#include "cuda/softmax.cuh"
#include "cuda/work.cuh"

namespace jax_flash {

// The results of a sequence's rows; they have the layout of lse.
__device__ __forceinline__ uint32_t* row_maxima(const Problem& p, const float* lse) {
  return p.row_max.as<uint32_t>() + (lse - p.lse.as<const float>());
}

// Stores the maxima of a softmax that keeps them exactly, in the rows [row, tile.end).
template <int kSlots, class Softmax, class Rows>
__device__ __forceinline__ void store_row_maxima(const Problem& p, const Softmax& softmax, const float* lse,
                                                 const Rows& offset, const TileWork& tile, int32_t row) {
  uint32_t* const to = row_maxima(p, lse);
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    const int32_t i = row + Accumulator<kSlots / 2, 1>::row(slot);
    const bool used = p.row_max && i < min(tile.q_len, tile.end) && threadIdx.x % 4 == 0;
    ptx::store_global(reinterpret_cast<float*>(to + offset(i)),
                      __uint_as_float(ordered(softmax.maximum(slot))), used);
  }
}

// Raises the results of a warp's rows [row, end) to the largest elements of S in a tile of keys. `to`: the
// result of the sequence's first row. power(x, slot): the score, times log2(e), that element x of S stands
// for.
template <class S, class Power>
__device__ __forceinline__ void raise_row_maxima(const S& s, uint32_t* to, int64_t stride, int32_t row,
                                                 int32_t end, Power power) {
#pragma unroll
  for (int slot = 0; slot < S::kSlots; ++slot) {
    const float top = power(row_max(thread_max(s, slot)), slot) * kLn2;
    const int32_t i = row + S::row(slot);
    if (threadIdx.x % 4 == 0 && i < end && top > -INFINITY) ptx::raise(to + i * stride, ordered(top));
  }
}

}  // namespace jax_flash
