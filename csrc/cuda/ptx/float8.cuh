// float8_e4m3fn to 16 bits: one instruction on sm_89 and newer.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "core/float8.h"
#include "cuda/ptx/math.cuh"

namespace jax_flash::ptx {

// Widens the two values in the lower two bytes; the lower byte goes to the low half.
template <class T>
__device__ __forceinline__ uint32_t widen_float8(uint32_t two) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  uint32_t pair;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"(static_cast<uint16_t>(two)));
  if constexpr (std::is_same_v<T, __half>) return pair;
  const float2 x = unpack<__half>(pair);
  return pack<T>(x.x, x.y);
#else
  return pack<T>(float8_to_float(static_cast<uint8_t>(two)), float8_to_float(static_cast<uint8_t>(two >> 8)));
#endif
}

}  // namespace jax_flash::ptx
