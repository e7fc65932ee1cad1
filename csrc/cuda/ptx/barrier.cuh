// Barriers in shared memory, on which arriving and waiting are two things, and the numbered barriers of a
// block. mbarrier is sm_80's and newer; on sm_75 a barrier is the count of all arrivals, and of those that
// end a phase.
#pragma once

#include <cstdint>

namespace jax_flash::ptx {

inline constexpr int kBarrierBytes = 8;

#if __CUDA_ARCH__ >= 800

// A phase ends when `count` have arrived; the next begins at once.
__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  [[maybe_unused]] uint64_t state;
  asm volatile("mbarrier.arrive.shared.b64 %0, [%1];" : "=l"(state) : "r"(barrier) : "memory");
}

// This thread arrives when the cp.async that it has issued are done.
__device__ __forceinline__ void barrier_arrive_after_copies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}

// Until the phase numbered `phase`, counted from 0, has ended. At most one phase behind the barrier's own.
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

#else

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t count) {
  asm volatile("st.shared.v2.u32 [%0], {0, %1};" ::"r"(barrier), "r"(count) : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  __threadfence_block();
  asm volatile("red.shared.add.u32 [%0], 1;" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_arrive_after_copies(uint32_t barrier) { barrier_arrive(barrier); }

__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t phase) {
  uint32_t arrived, count;
  do {
    asm volatile("ld.volatile.shared.v2.u32 {%0, %1}, [%2];"
                 : "=r"(arrived), "=r"(count)
                 : "r"(barrier)
                 : "memory");
  } while (static_cast<int32_t>(arrived - (phase + 1) * count) < 0);
  __threadfence_block();
}

#endif

// A warp's arrivals at a barrier: its first lane's, after __syncwarp. compute-sanitizer's racecheck takes an
// arrival for what the thread itself has done: for it (tools/gpu_memory.py) every lane arrives.
#ifdef JAX_FLASH_EVERY_LANE
inline constexpr uint32_t kWarpArrivals = 32;
#else
inline constexpr uint32_t kWarpArrivals = 1;
#endif
__device__ __forceinline__ bool arrives_for_warp() { return kWarpArrivals > 1 || threadIdx.x % 32 == 0; }

// For what all lanes of this warp have done.
__device__ __forceinline__ void barrier_arrive_by_warp(uint32_t barrier) {
  __syncwarp();
  if (arrives_for_warp()) barrier_arrive(barrier);
}

// threadIdx.x, read where it is asked for instead of kept in a register.
__device__ __forceinline__ int thread_index() {
  int x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
}

// As __syncthreads for `threads` of the block, whole warps; numbers from 1 to 15.
__device__ __forceinline__ void sync_group(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// This warp's part of a sync_group, without waiting for the others.
__device__ __forceinline__ void arrive_group(int number, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

}  // namespace jax_flash::ptx
