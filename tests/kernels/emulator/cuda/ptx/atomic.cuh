// csrc/cuda/ptx/atomic.cuh on the emulator, whose blocks run one after the other.
#pragma once

#include "emulator.h"

namespace jax_flash::ptx {

inline unsigned long long load_relaxed(const unsigned long long* from) { return *from; }
inline void exchange_if(unsigned long long* to, unsigned long long expected, unsigned long long x) {
  if (*to == expected) *to = x;
}
inline unsigned long long add_released(unsigned long long* to, unsigned long long x) {
  const unsigned long long before = *to;
  *to += x;
  return before;
}
inline void acquire() {}
inline void raise(uint32_t* to, uint32_t x) { *to = *to < x ? x : *to; }
inline float4 load_shared_by_blocks(const float4* from) { return *from; }
inline float2 load_shared_by_blocks(const float2* from) { return *from; }

}  // namespace jax_flash::ptx
