// Floats as integers of the same order, of which the largest is found by atomics.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace jax_flash {

// x as an integer of the same order; 0 is that of no number.
__device__ __forceinline__ uint32_t ordered(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

}  // namespace jax_flash
