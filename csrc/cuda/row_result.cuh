// What a row's softmax ends with: the factor of O, and lse.
#pragma once

#include <cfloat>
#include <cmath>

#include "core/score.h"
#include "cuda/ptx/math.cuh"

namespace jax_flash {

// 1 / Σ P, the factor of a row's O, and the row's lse.
struct RowResult {
  float factor, lse;
};

// top: scale · m in powers of two, −∞ if the row has seen no key, or only keys with a bias so low that this
// product overflows, which hides them. sum: Σ P. sink: a logit that is only added to the sum; −∞ if there is
// none. The lse of a row that sees nothing is its sink to the last bit.
__device__ __forceinline__ RowResult result_of_row(float top, float sum, float sink) {
  const float product = sink * kLog2e;  // of a large finite sink it is infinite
  const bool overflows = fabsf(product) > FLT_MAX && fabsf(sink) <= FLT_MAX;
  const float sink_log2 = overflows ? copysignf(FLT_MAX, sink) : product;
  const float largest = fmaxf(top, sink_log2);
  const float alpha = ptx::exp2(top - largest);
  const float total = fmaf(sum, alpha, ptx::exp2(sink_log2 - largest));
  if (largest == -INFINITY && sum >= 0) return {0, -INFINITY};  // if all scores are NaN, so is the sum
  return {alpha * ptx::reciprocal(total),
          fmaf(ptx::log2(total), kLn2, top <= sink_log2 ? sink : largest * kLn2)};
}

}  // namespace jax_flash
