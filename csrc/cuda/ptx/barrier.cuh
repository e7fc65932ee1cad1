// mbarrier, whose arrive and wait are separate, and the named barriers of a thread block (bar.sync). sm_75
// has no mbarrier: there a barrier is two counters in shared memory, one of all arrivals so far and one of
// the arrivals that complete a phase.
#pragma once

#include <cstdint>

namespace jax_flash::ptx {

inline constexpr int kBarrierBytes = 8;

#if __CUDA_ARCH__ >= 800

// A phase completes when `count` threads have arrived, and the next phase begins at once.
__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  [[maybe_unused]] uint64_t state;
  asm volatile("mbarrier.arrive.shared.b64 %0, [%1];" : "=l"(state) : "r"(barrier) : "memory");
}

// This thread arrives as soon as all cp.async that it has issued are complete.
__device__ __forceinline__ void barrier_arrive_after_copies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}

// Waits until phase number `phase`, counted from 0, is complete. The barrier may be at most one phase ahead.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t phase) {
  uint32_t done;
  do {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
#if __CUDA_ARCH__ >= 900
        "mbarrier.try_wait.parity.shared.b64 done, [%1], %2;\n"
#else
        "mbarrier.test_wait.parity.shared.b64 done, [%1], %2;\n"
#endif
        "selp.u32 %0, 1, 0, done;\n"
        "}"
        : "=r"(done)
        : "r"(barrier), "r"(phase & 1)
        : "memory");
  } while (!done);
}

// Whether the phase is complete.
__device__ __forceinline__ bool barrier_is_complete(uint32_t barrier, uint32_t phase) {
  uint32_t done;
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "mbarrier.test_wait.parity.shared.b64 done, [%1], %2;\n"
      "selp.u32 %0, 1, 0, done;\n"
      "}"
      : "=r"(done)
      : "r"(barrier), "r"(phase & 1)
      : "memory");
  return done;
}

#else

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t count) {
  asm volatile("st.shared.v2.u32 [%0], {0, %1};" ::"r"(barrier), "r"(count) : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  __threadfence_block();
  asm volatile("red.shared.add.u32 [%0], 1;" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_arrive_after_copies(uint32_t barrier) { barrier_arrive(barrier); }

__device__ __forceinline__ bool barrier_is_complete(uint32_t barrier, uint32_t phase) {
  uint32_t arrived, count;
  asm volatile("ld.volatile.shared.v2.u32 {%0, %1}, [%2];"
               : "=r"(arrived), "=r"(count)
               : "r"(barrier)
               : "memory");
  if (static_cast<int32_t>(arrived - (phase + 1) * count) < 0) return false;
  __threadfence_block();
  return true;
}

__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t phase) {
  while (!barrier_is_complete(barrier, phase)) {
  }
}

#endif

// How many arrivals stand for a warp: one, of its first lane, after __syncwarp. compute-sanitizer's racecheck
// believes that an arrival orders the arriving thread's accesses only, so under it (tools/gpu_memory.py)
// every lane arrives.
#ifdef JAX_FLASH_EVERY_LANE
inline constexpr uint32_t kWarpArrivals = 32;
#else
inline constexpr uint32_t kWarpArrivals = 1;
#endif
__device__ __forceinline__ bool arrives_for_warp() { return kWarpArrivals > 1 || threadIdx.x % 32 == 0; }

// Arrives for all lanes of this warp.
__device__ __forceinline__ void barrier_arrive_by_warp(uint32_t barrier) {
  __syncwarp();
  if (arrives_for_warp()) barrier_arrive(barrier);
}

// threadIdx.x, read from its special register here instead of kept in a general one.
__device__ __forceinline__ int thread_index() {
  int x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
}

// The thread's number in its warp, read in the same way.
__device__ __forceinline__ uint32_t lane_index() {
  uint32_t x;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(x));
  return x;
}

// Named barrier `number` (1 to 15; 0 is __syncthreads) for `threads` threads of the block, in whole warps. It
// is aligned: all warps must reach it at the same instruction.
__device__ __forceinline__ void sync_group(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// A named barrier that is not aligned: warps may reach it at different instructions, and their lanes need not
// have converged. Number 0 is __syncthreads here too.
__device__ __forceinline__ void sync_any_group(int number, int threads) {
  asm volatile("barrier.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// Arrives at a named barrier without waiting.
__device__ __forceinline__ void arrive_group(int number, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

}  // namespace jax_flash::ptx
