// red.add: float32 additions to global memory that return nothing.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace jax_flash::ptx {

// Adds a warp's fragment of mma's C, 16 × 8, to a block of 128 floats that begins at a multiple of 16 bytes.
// This is one instruction on sm_90 and newer; below, the block's order makes each of the four instructions
// add to contiguous memory.
__device__ __forceinline__ void add_fragment(float* block, uint32_t lane, const float (&x)[4]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(block + 4 * lane), "f"(x[0]), "f"(x[1]),
               "f"(x[2]), "f"(x[3])
               : "memory");
#else
#pragma unroll
  for (int i = 0; i < 4; ++i) atomicAdd(block + 32 * i + lane, x[i]);
#endif
}

// Stores a fragment in such a block. Only for sm_90 and newer.
__device__ __forceinline__ void store_fragment(float* block, uint32_t lane, const float (&x)[4]) {
  *reinterpret_cast<float4*>(block + 4 * lane) = make_float4(x[0], x[1], x[2], x[3]);
}

// x[t] ← the elements of lane 4 · row + t in such a block: columns 2 · t and 2 · t + 1 of `row`, row < 8, and
// of row + 8.
__device__ __forceinline__ void load_fragments(float (&x)[4][4], const float* block, int row) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#if __CUDA_ARCH__ >= 900
    const float4 lane = *reinterpret_cast<const float4*>(block + 16 * row + 4 * i);
    x[i][0] = lane.x, x[i][1] = lane.y, x[i][2] = lane.z, x[i][3] = lane.w;
#else
    const float4 lanes = *reinterpret_cast<const float4*>(block + 32 * i + 4 * row);
    x[0][i] = lanes.x, x[1][i] = lanes.y, x[2][i] = lanes.z, x[3][i] = lanes.w;
#endif
  }
}

}  // namespace jax_flash::ptx
