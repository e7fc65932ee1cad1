// wgmma (sm_90a): products of a warpgroup, D [64, N] += A [64, 16] B [16, N] in float32, which run beside the
// threads that issued them. D is laid out as mma.sync's accumulator, 16 rows for each of the four warps.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace jax_flash::ptx {

// Between the last use of registers that the next wgmma reads or writes, and that wgmma.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Until at most `kPending` of the newest groups are in flight.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// The compiler neither reads these registers earlier nor writes them later than here.
template <int n>
__device__ __forceinline__ void hold(float (&d)[n][4]) {
#pragma unroll
  for (int i = 0; i < n * 4; ++i) asm volatile("" : "+f"(d[i / 4][i % 4])::"memory");
}

template <int n>
__device__ __forceinline__ void hold(uint32_t (&a)[n][4]) {
#pragma unroll
  for (int i = 0; i < n * 4; ++i) asm volatile("" : "+r"(a[i / 4][i % 4])::"memory");
}

// The assembler puts what x is made of before a wait that comes after this: it would be made later, beside
// nothing. x is never below 0, nothing is ever stored.
__device__ __forceinline__ void make_before(float x) {
  asm volatile(
      "{.reg .pred below; .reg .b32 at; mov.b32 at, %0; setp.lt.f32 below, %0, 0f00000000; "
      "@below st.shared.f32 [at], %0;}" ::"f"(x)
      : "memory");
}

// multiply<kFirst>(d, a, b): D += A B, or D = A B where it is the first. A is a descriptor
// (tile/descriptor.cuh) or four registers, as mma.sync's; B a descriptor. kTransposeA, kTransposeB = 1: the
// operand's rows in shared memory are those of k.
template <class T, int N>
struct Wgmma;

}  // namespace jax_flash::ptx

#include "wgmma_instances.cuh"
