// csrc/cuda/ptx/math.cuh on the emulator.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "emulator.h"

namespace jax_flash {

using float16 = __half;
using bfloat16 = __nv_bfloat16;
using float32 = float;

}  // namespace jax_flash

namespace jax_flash::ptx {

inline float exp2(float x) { return std::exp2(x); }
inline float log2(float x) { return std::log2(x); }
inline float reciprocal(float x) { return 1 / x; }
inline int max3(int x, int y, int z) { return std::max({x, y, z}); }
inline int min3(int x, int y, int z) { return std::min({x, y, z}); }
inline uint32_t shift_left(uint32_t x, uint32_t n) { return n < 32 ? x << n : 0; }
inline float max_nan(float x, float y) { return x > y || x != x ? x : y; }

inline uint32_t sign_of_low(uint32_t x) { return x & 0x8000u ? ~0u : 0; }
inline uint32_t sign_of_high(uint32_t x) { return x & 0x80000000u ? ~0u : 0; }
inline uint32_t even_bytes(uint32_t x) { return (x & 0xFFu) | (x >> 8 & 0xFF00u); }
inline uint32_t odd_bytes(uint32_t x) { return even_bytes(x >> 8); }
inline void multiply_add_if_bit(uint32_t word, uint32_t bit, float& x, float y, float& sum) {
  if (word & bit) {
    sum = std::fma(x, y, sum);
  } else {
    x = 0;
  }
}
inline uint32_t size_not_below(uint32_t x, uint32_t y) {
  const auto half = [](uint32_t bits, int shift) {
    const auto upper = static_cast<uint16_t>(bits >> shift);
    __half h;
    std::memcpy(&h, &upper, 2);
    return static_cast<float>(h);
  };
  x &= 0x7FFF7FFFu;
  return (half(x, 0) < half(y, 0) ? 0 : 0xFFFFu) | (half(x, 16) < half(y, 16) ? 0 : 0xFFFF0000u);
}

template <class T>
uint32_t pack(float low, float high) {
  const T pair[2] = {T(low), T(high)};
  uint32_t bits;
  std::memcpy(&bits, pair, 4);
  return bits;
}

template <class T>
float2 unpack(uint32_t bits) {
  T pair[2];
  std::memcpy(pair, &bits, 4);
  return {pair[0], pair[1]};
}

template <class T>
void store_pair(T* to, float low, float high) {
  to[0] = T(low), to[1] = T(high);
}

template <class T>
float2 load_pair(const T* from) {
  return {static_cast<float>(from[0]), static_cast<float>(from[1])};
}

}  // namespace jax_flash::ptx
