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

// The two values in the lower two bytes as float16, in which they are exact; the lower byte goes to the low
// half.
template <DType kFormat>
__device__ __forceinline__ uint32_t float8_to_halves(uint32_t two) {
  if constexpr (kFormat == DType::kF8E5M2) return (two & 0xFFu) << 8 | (two & 0xFF00u) << 16;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  uint32_t pair;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"(static_cast<uint16_t>(two)));
  return pair;
#else
  constexpr auto widen = [](uint32_t x) { return float8_to_float<kFormat>(static_cast<uint8_t>(x)); };
  return pack<__half>(widen(two), widen(two >> 8));
#endif
}

// The same as float32, and as T.
template <DType kFormat>
__device__ __forceinline__ float2 float8_to_floats(uint32_t two) {
  return unpack<__half>(float8_to_halves<kFormat>(two));
}
template <class T, DType kFormat>
__device__ __forceinline__ uint32_t widen_float8(uint32_t two) {
  if constexpr (std::is_same_v<T, __half>) {
    return float8_to_halves<kFormat>(two);
  } else {
    const float2 x = float8_to_floats<kFormat>(two);
    return pack<T>(x.x, x.y);
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
