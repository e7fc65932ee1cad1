// The online softmax: running maximum and sum of a thread's rows.
#pragma once

#include <cmath>

#include "core/score.h"
#include "cuda/ptx/math.cuh"

namespace jax_flash {

// The reductions over a row: the four lanes that hold it.
__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// m: largest score so far, l: this lane's share of Σ 2^(scale · (s − m)). `scale` turns scores into powers of
// two.
template <int kSlots>
struct OnlineSoftmax {
  float m[kSlots], l[kSlots];
  float scale;

  __device__ __forceinline__ explicit OnlineSoftmax(float scale_log2) : scale(scale_log2) {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) m[slot] = -INFINITY, l[slot] = 0;
  }

  // S → P = 2^(scale · (S − m)) in place, with the new m; O ← α O.
  template <class S, class O>
  __device__ __forceinline__ void update(S& s, O& o) {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      float largest = m[slot];
#pragma unroll
      for (int n = 0; n < S::kColumnTiles; ++n)
        largest = fmaxf(largest, fmaxf(s.at(slot, n, 0), s.at(slot, n, 1)));
      largest = row_max(largest);
      // A row without a visible key so far has m = −inf; 0 in its place gives P = 0 instead of NaN.
      const float shift = largest == -INFINITY ? 0 : largest * scale;
      const float alpha = ptx::exp2(fmaf(m[slot], scale, -shift));
      m[slot] = largest;
      float sum = 0;
#pragma unroll
      for (int n = 0; n < S::kColumnTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& x = s.at(slot, n, i);
          x = ptx::exp2(fmaf(x, scale, -shift));
          sum += x;
        }
      }
      l[slot] = fmaf(l[slot], alpha, sum);
#pragma unroll
      for (int n = 0; n < O::kColumnTiles; ++n) o.at(slot, n, 0) *= alpha, o.at(slot, n, 1) *= alpha;
    }
  }

  // What a row's accumulator is multiplied by, and its lse. `sink` is a logit that joins the sum only, −inf:
  // none.
  struct Final {
    float factor, lse;
  };
  __device__ __forceinline__ Final finish(int slot, float sink) const {
    const float sum = row_sum(l[slot]);
    const float top = m[slot] * scale, sink_log2 = sink * kLog2e;
    const float largest = fmaxf(top, sink_log2);
    if (largest == -INFINITY && sum == 0) return {0, -INFINITY};  // a NaN alone has no maximum
    const float alpha = ptx::exp2(top - largest);
    const float total = fmaf(sum, alpha, ptx::exp2(sink_log2 - largest));
    return {alpha / total, (largest + log2f(total)) * kLn2};
  }
};

}  // namespace jax_flash
