// csrc/cuda/ptx/global.cuh on the emulator.
#pragma once

#include "emulator.h"

namespace jax_flash::ptx {

inline void store_global(void* to, const uint4& x, bool used) {
  if (used) *static_cast<uint4*>(to) = x;
}

inline void store_global(float* to, float x, bool used) {
  if (used) *to = x;
}

inline float load_global(const float* from, bool used, float otherwise) { return used ? *from : otherwise; }

}  // namespace jax_flash::ptx
