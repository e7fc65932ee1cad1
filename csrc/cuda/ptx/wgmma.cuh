// wgmma (sm_90a): asynchronous products of a warpgroup, D [64, N] += A [64, 16] B [16, N] in float32. Each of
// the four warps holds 16 rows of D in mma.sync's C layout.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace jax_flash::ptx {

// Orders earlier accesses to registers before the next wgmma that reads or writes them.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most the newest kPending groups are in flight.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Compiler fence on registers (CUTLASS: warpgroup_fence_operand): accesses to them do not move across it.
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

// Compiler fence on an address or a number: what depends on it is computed here. The compiler would otherwise
// move the descriptors of all k steps out of the loop, more than there are registers for.
__device__ __forceinline__ uint32_t here(uint32_t address) {
  asm volatile("" : "+r"(address));
  return address;
}

// Scheduling fence: makes ptxas compute x before a wait that follows, so that the computation overlaps what
// is waited for. ptxas would otherwise move it after the wait. x is never negative, so the store never
// happens.
__device__ __forceinline__ void make_before(float x) {
  asm volatile(
      "{.reg .pred below; .reg .b32 at; mov.b32 at, %0; setp.lt.f32 below, %0, 0f00000000; "
      "@below st.shared.f32 [at], %0;}" ::"f"(x)
      : "memory");
}

// multiply<kFirst>(d, a, b): D = A B if kFirst, else D += A B. A is a descriptor (tile/descriptor.cuh) or
// four registers in mma.sync's A layout; B is a descriptor. kTransposeA, kTransposeB = 1: the operand is
// MN-major.
template <class T, int N>
struct Wgmma;

}  // namespace jax_flash::ptx

#include "wgmma_instances.cuh"
