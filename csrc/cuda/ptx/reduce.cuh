// red.add: float32 added to global memory, nothing returned.
#pragma once

namespace jax_flash::ptx {

// Two neighbours, at an address that is a multiple of 8; one instruction on sm_90 and newer.
__device__ __forceinline__ void add_pair(float* to, float low, float high) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(low), "f"(high) : "memory");
#else
  atomicAdd(to, low);
  atomicAdd(to + 1, high);
#endif
}

}  // namespace jax_flash::ptx
