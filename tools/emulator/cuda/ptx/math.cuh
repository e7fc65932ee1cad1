// As csrc/cuda/ptx/math.cuh.
#pragma once

#include "emulator.h"

namespace jax_flash::ptx {

inline float exp2(float x) { return std::exp2(x); }

template <class T>
uint32_t pack(float low, float high) {
  const T pair[2] = {T(low), T(high)};
  uint32_t bits;
  std::memcpy(&bits, pair, 4);
  return bits;
}

}  // namespace jax_flash::ptx
