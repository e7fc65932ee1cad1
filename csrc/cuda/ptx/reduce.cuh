// red.add: float32 added to global memory, nothing returned.
#pragma once

#include <cstdint>

namespace jax_flash::ptx {

// Where element i of lane t's four lies in a block of 16: as add_quad is fastest.
__device__ __forceinline__ int quad_position(int t, int i) {
#if __CUDA_ARCH__ >= 900
  return 4 * t + i;
#else
  return 4 * i + t;
#endif
}

// Adds lane t's four elements, t < 4, to a block of 16 that begins at a multiple of 16 bytes. One instruction
// on sm_90 and newer.
__device__ __forceinline__ void add_quad(float* block, int t, float a, float b, float c, float d) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(block + 4 * t), "f"(a), "f"(b), "f"(c),
               "f"(d)
               : "memory");
#else
  atomicAdd(block + quad_position(t, 0), a);
  atomicAdd(block + quad_position(t, 1), b);
  atomicAdd(block + quad_position(t, 2), c);
  atomicAdd(block + quad_position(t, 3), d);
#endif
}

}  // namespace jax_flash::ptx
