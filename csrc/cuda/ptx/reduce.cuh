// red.add: float32 additions to global memory that return nothing.
#pragma once

#include <cstdint>

namespace jax_flash::ptx {

// The position in a block of 16 floats of element i of lane t, t < 4 and i < 4, in the order that add_quad
// needs.
__device__ __forceinline__ int quad_position(int t, int i) {
#if __CUDA_ARCH__ >= 900
  return 4 * t + i;
#else
  return 4 * i + t;
#endif
}

// Adds the four elements of lane t, t < 4, to a block of 16 floats that begins at a multiple of 16 bytes.
// This is one instruction on sm_90 and newer; below, the order makes the four lanes' additions contiguous.
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

// Adds four floats, at a multiple of 16 bytes (sm_90 and newer).
__device__ __forceinline__ void add_float4(float* to, const float (&x)[4]) {
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(x[0]), "f"(x[1]), "f"(x[2]),
               "f"(x[3])
               : "memory");
}

}  // namespace jax_flash::ptx
