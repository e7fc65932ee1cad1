// Floats as integers with the same order, so that atomics can find the largest.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace jax_flash {

// x as an integer with the same order; no float has the integer 0.
__device__ __forceinline__ uint32_t ordered(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

}  // namespace jax_flash
