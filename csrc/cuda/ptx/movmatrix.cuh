// movmatrix: transposes an 8 × 8 matrix of 16-bit elements across a warp's registers (sm_75 and newer).
#pragma once

#include <cstdint>

namespace jax_flash::ptx {

__device__ __forceinline__ uint32_t transpose(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

}  // namespace jax_flash::ptx
