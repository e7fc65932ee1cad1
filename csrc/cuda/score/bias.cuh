// The bias: S ← S + bias. A bias of −∞ hides the key, whatever S is (under_bias in core/score.h).
#pragma once

#include <cuda_runtime_api.h>

#include "core/score.h"

namespace jax_flash {

// Adds a bias to x, which is `factor` times the score.
__device__ __forceinline__ void add_bias(float& x, float bias, float factor) {
  x = fmaf(bias, factor, under_bias(x, bias));
}

// S ← scale · S + bias
__device__ __forceinline__ void scale_and_add_bias(float& x, float scale, float bias) {
  x = fmaf(under_bias(x, bias), scale, bias);
}

}  // namespace jax_flash
