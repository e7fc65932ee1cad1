// Single instructions of arithmetic and conversion.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace jax_flash {

// The dtype names of csrc/kernels.def.
using float16 = __half;
using bfloat16 = __nv_bfloat16;
using float32 = float;

}  // namespace jax_flash

namespace jax_flash::ptx {

// 2^x with an error of 2 ulp; 2^-inf = 0.
__device__ __forceinline__ float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// log2 x with an absolute error of 2^-22, or a relative one where |log2 x| > 1; log2(0) = -inf.
__device__ __forceinline__ float log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x with an error of 1 ulp.
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The maximum and minimum of three integers: one instruction on sm_90 and newer.
__device__ __forceinline__ int max3(int x, int y, int z) { return __vimax3_s32(x, y, z); }
__device__ __forceinline__ int min3(int x, int y, int z) { return __vimin3_s32(x, y, z); }
__device__ __forceinline__ uint32_t min3(uint32_t x, uint32_t y, uint32_t z) { return __vimin3_u32(x, y, z); }

// x shifted by n bits; 0 if n is 32 or more, where C++ defines no result.
__device__ __forceinline__ uint32_t shift_left(uint32_t x, uint32_t n) {
  uint32_t y;
  asm("shl.b32 %0, %1, %2;" : "=r"(y) : "r"(x), "r"(n));
  return y;
}

// prmt: hex digit i of kSelector says what byte i of the result is. A digit b copies byte b of x; a digit 8 +
// b repeats the sign bit of byte b, for which __byte_perm has no code.
template <uint32_t kSelector>
__device__ __forceinline__ uint32_t permute_bytes(uint32_t x) {
  uint32_t y;
  asm("prmt.b32 %0, %1, 0, %2;" : "=r"(y) : "r"(x), "n"(kSelector));
  return y;
}

// Both 16-bit halves filled with the sign bit of the low (high) half of x.
__device__ __forceinline__ uint32_t sign_of_low(uint32_t x) { return permute_bytes<0x9999>(x); }
__device__ __forceinline__ uint32_t sign_of_high(uint32_t x) { return permute_bytes<0xBBBB>(x); }

// For each half, as float16: 0xFFFF where |x| is greater than or equal to y or either is NaN, else 0. The
// absolute value is a part of the comparison's instruction.
__device__ __forceinline__ uint32_t size_not_below(uint32_t x, uint32_t y) {
  return __hgeu2_mask(__habs2(reinterpret_cast<const __half2&>(x)), reinterpret_cast<const __half2&>(y));
}

// Where `bit` of `word` is set: sum ← x · y + sum. Elsewhere: x ← 0, and y is not read. ptxas moves several
// bits of a word to predicates at once, but it does not find this for the same test in C++.
__device__ __forceinline__ void multiply_add_if_bit(uint32_t word, uint32_t bit, float& x, float y,
                                                    float& sum) {
  asm("{\n"
      ".reg .pred set;\n"
      ".reg .b32 own;\n"
      "and.b32 own, %2, %3;\n"
      "setp.ne.u32 set, own, 0;\n"
      "@set fma.rn.f32 %1, %0, %4, %1;\n"
      "selp.f32 %0, %0, 0f00000000, set;\n"
      "}"
      : "+f"(x), "+f"(sum)
      : "r"(word), "r"(bit), "f"(y));
}

// Bytes 0 and 2 (1 and 3) of x in the lower two bytes.
__device__ __forceinline__ uint32_t even_bytes(uint32_t x) { return __byte_perm(x, 0, 0x4420); }
__device__ __forceinline__ uint32_t odd_bytes(uint32_t x) { return __byte_perm(x, 0, 0x4431); }

// Two floats rounded to T in one register, `low` in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack<__half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// The inverse of pack.
template <class T>
__device__ __forceinline__ float2 unpack(uint32_t pair);

template <>
__device__ __forceinline__ float2 unpack<__half>(uint32_t pair) {
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}

template <>
__device__ __forceinline__ float2 unpack<__nv_bfloat16>(uint32_t pair) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000u));
}

// Stores two floats, rounded to T, to adjacent elements.
template <class T>
__device__ __forceinline__ void store_pair(T* to, float low, float high) {
  *reinterpret_cast<uint32_t*>(to) = pack<T>(low, high);
}

template <>
__device__ __forceinline__ void store_pair<float>(float* to, float low, float high) {
  *reinterpret_cast<float2*>(to) = make_float2(low, high);
}

// Two adjacent elements as floats.
template <class T>
__device__ __forceinline__ float2 load_pair(const T* from) {
  return unpack<T>(*reinterpret_cast<const uint32_t*>(from));
}

template <>
__device__ __forceinline__ float2 load_pair<float>(const float* from) {
  return *reinterpret_cast<const float2*>(from);
}

}  // namespace jax_flash::ptx
