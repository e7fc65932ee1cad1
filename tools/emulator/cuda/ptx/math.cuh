// As csrc/cuda/ptx/math.cuh.
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
inline float reciprocal(float x) { return 1 / x; }

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

}  // namespace jax_flash::ptx
