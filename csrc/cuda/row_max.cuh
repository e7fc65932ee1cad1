// The result row_max while a call computes it: integers of the same order as the scores, 0 for none. Memory
// is cleared before the kernels, and JAX makes floats of them (jax_flash/largest.py).
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

// Where the results of a sequence's rows lie: as those of lse do.
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

// Raises the results of a warp's rows [row, end) to the largest of S in a tile of keys. `to`: that of the
// sequence's first row. power(x, slot): the score of which S has x, in powers of two.
template <class S, class Power>
__device__ __forceinline__ void raise_row_maxima(const S& s, uint32_t* to, int64_t stride, int32_t row,
                                                 int32_t end, Power power) {
#pragma unroll
  for (int slot = 0; slot < S::kSlots; ++slot) {
    float top = s.at(slot, 0, 0);
#pragma unroll
    for (int i = 1; i < 2 * S::kColumnTiles; ++i) top = fmaxf(top, s.at(slot, i / 2, i % 2));
    top = power(row_max(top), slot) * kLn2;
    const int32_t i = row + S::row(slot);
    if (threadIdx.x % 4 == 0 && i < end && top > -INFINITY) ptx::raise(to + i * stride, ordered(top));
  }
}

}  // namespace jax_flash
