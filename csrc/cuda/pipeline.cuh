// A pipeline of shared-memory stages between producer and consumer warps of a thread block.
//
//   producer   wait_empty(use)    its copies count on full_barrier(use), or arrive(use)
//   consumer   wait_full(use)     reads the stage     release(use)
//
// Uses are counted from 0: use i has stage i % kStages, in phase i / kStages of its barriers.
#pragma once

#include <cstdint>

#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/shared.cuh"

namespace jax_flash {

template <int kStages>
struct BlockPipeline {
  uint64_t full[kStages], empty[kStages];

  // A stage is empty after `releases`, and full after `arrivals` and the bytes that were expected. The caller
  // makes the barriers visible after all of its pipelines.
  __device__ __forceinline__ void init(uint32_t releases, uint32_t arrivals = 1) {
    for (int i = 0; i < kStages; ++i) {
      ptx::barrier_init(ptx::shared_address(&full[i]), arrivals);
      ptx::barrier_init(ptx::shared_address(&empty[i]), releases);
    }
  }
  __device__ __forceinline__ uint32_t full_barrier(uint32_t use) const {
    return ptx::shared_address(&full[use % kStages]);
  }
  __device__ __forceinline__ uint32_t empty_barrier(uint32_t use) const {
    return ptx::shared_address(&empty[use % kStages]);
  }
  __device__ __forceinline__ uint32_t phase(uint32_t use) const { return use / kStages & 1; }

  __device__ __forceinline__ void wait_full(uint32_t use) const {
    ptx::barrier_wait(full_barrier(use), phase(use));
  }
  __device__ __forceinline__ bool is_full(uint32_t use) const {
    return ptx::barrier_test(full_barrier(use), phase(use));
  }
  __device__ __forceinline__ void wait_full(uint32_t use, bool known) const {
    if (!known) wait_full(use);
  }
  // Waits for the release of the stage's previous use, if it had one.
  __device__ __forceinline__ void wait_empty(uint32_t use) const {
    ptx::barrier_wait(empty_barrier(use), phase(use) ^ 1);
  }
  // Waits until the stage's previous use was full.
  __device__ __forceinline__ void wait_previous_full(uint32_t use) const {
    ptx::barrier_wait(full_barrier(use), phase(use) ^ 1);
  }
  __device__ __forceinline__ void arrive(uint32_t use) const { ptx::barrier_arrive(full_barrier(use)); }
  __device__ __forceinline__ void arrive_by_warp(uint32_t use) const {
    ptx::barrier_arrive_by_warp(full_barrier(use));
  }
  // Says that this warp has read the stage; release_by_thread() says that one thread has.
  __device__ __forceinline__ void release(uint32_t use) const {
    ptx::barrier_arrive_by_warp(empty_barrier(use));
  }
  __device__ __forceinline__ void release_by_thread(uint32_t use) const {
    ptx::barrier_arrive(empty_barrier(use));
  }
};

}  // namespace jax_flash
