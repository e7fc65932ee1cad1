// float8 to 16 bits: float8_e4m3fn in one instruction on sm_89 and newer, float8_e5m2, which is the upper
// byte of a float16, in one or two everywhere.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "core/float8.h"
#include "cuda/ptx/math.cuh"

namespace jax_flash::ptx {

template <class T>
__device__ __forceinline__ uint32_t widen_e4m3(uint32_t two) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  uint32_t pair;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"(static_cast<uint16_t>(two)));
  if constexpr (std::is_same_v<T, __half>) return pair;
  const float2 x = unpack<__half>(pair);
  return pack<T>(x.x, x.y);
#else
  constexpr auto widen = [](uint32_t x) { return float8_to_float<DType::kF8E4M3>(static_cast<uint8_t>(x)); };
  return pack<T>(widen(two), widen(two >> 8));
#endif
}

template <class T>
__device__ __forceinline__ uint32_t widen_e5m2(uint32_t two) {
  const uint32_t pair = (two & 0xFFu) << 8 | (two & 0xFF00u) << 16;
  if constexpr (std::is_same_v<T, __half>) return pair;
  const float2 x = unpack<__half>(pair);
  return pack<T>(x.x, x.y);
}

// Widens the two values in the lower two bytes; the lower byte goes to the low half.
template <class T, DType kFormat>
__device__ __forceinline__ uint32_t widen_float8(uint32_t two) {
  if constexpr (kFormat == DType::kF8E5M2) {
    return widen_e5m2<T>(two);
  } else {
    return widen_e4m3<T>(two);
  }
}

// Rounds two values to float8 as float_to_float8 does; `low` goes to the lower byte.
template <DType kFormat>
__device__ __forceinline__ uint16_t narrow_float8(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  uint16_t two;
  if constexpr (kFormat == DType::kF8E5M2) {
    asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(two) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(two) : "f"(high), "f"(low));
  }
  return two;
#else
  return static_cast<uint16_t>(float_to_float8<kFormat>(low) | float_to_float8<kFormat>(high) << 8);
#endif
}

// Calls f.operator()<format>(). All threads have the same format, so this is one branch around all that f
// widens.
template <class F>
__device__ __forceinline__ void with_format(DType format, F f) {
  if (format == DType::kF8E5M2) {
    f.template operator()<DType::kF8E5M2>();
  } else {
    f.template operator()<DType::kF8E4M3>();
  }
}

}  // namespace jax_flash::ptx
