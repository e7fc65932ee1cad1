// Atomic operations on 64-bit words in global memory, and loads that go with them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace jax_flash::ptx {

__device__ __forceinline__ unsigned long long load_relaxed(const unsigned long long* from) {
  return *static_cast<const volatile unsigned long long*>(from);
}

// *to ← x if it is `expected`.
__device__ __forceinline__ void exchange_if(unsigned long long* to, unsigned long long expected,
                                            unsigned long long x) {
  atomicCAS(to, expected, x);
}

// Returns the previous value. All that this thread has written before, and through a barrier its block, is
// visible to a thread that reads the sum and then calls acquire(), and through a barrier to that thread's
// block.
__device__ __forceinline__ unsigned long long add_released(unsigned long long* to, unsigned long long x) {
  unsigned long long before;
  asm volatile("atom.release.gpu.global.add.u64 %0, [%1], %2;" : "=l"(before) : "l"(to), "l"(x) : "memory");
  return before;
}

__device__ __forceinline__ void acquire() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// *to ← max(*to, x)
__device__ __forceinline__ void raise(uint32_t* to, uint32_t x) {
  asm volatile("red.relaxed.gpu.global.max.u32 [%0], %1;" ::"l"(to), "r"(x) : "memory");
}

// Counters that other blocks wait for. A thread raises one after its own additions to global memory, and
// after those of threads that it has waited for at a barrier.
__device__ __forceinline__ void raise_by_thread(uint32_t* count) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(count) : "memory");
}
__device__ __forceinline__ void raise_by_warp(uint32_t* count) {
  __syncwarp();  // the release must also follow the other lanes' additions
  if (threadIdx.x % 32 == 0) raise_by_thread(count);
}
__device__ __forceinline__ bool is_at_least(const uint32_t* count, uint32_t least) {
  uint32_t x;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(count) : "memory");
  return x >= least;
}
__device__ __forceinline__ void wait_at_least(const uint32_t* count, uint32_t least) {
  while (!is_at_least(count, least)) {
  }
}

// Loads that see what other blocks of this kernel have written.
__device__ __forceinline__ float4 load_shared_by_blocks(const float4* from) { return __ldcg(from); }
__device__ __forceinline__ float2 load_shared_by_blocks(const float2* from) { return __ldcg(from); }

}  // namespace jax_flash::ptx
