// The pipelines of the sm_90a kernels: cuda/pipeline.cuh, extended to clusters.
#pragma once

#include <cstdint>

#include "cuda/pipeline.cuh"
#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/tma.cuh"

namespace jax_flash {

// The caller runs ptx::fence_barriers() after init() of all of its pipelines.
template <int kStages>
struct Pipeline : BlockPipeline<kStages> {
  using Block = BlockPipeline<kStages>;
  using Block::empty_barrier, Block::release, Block::wait_empty, Block::wait_previous_full;

  // Says that this warp has read the stage, to the `cluster` CTAs that load it together, or to this CTA if 1.
  __device__ __forceinline__ void release_in_all(uint32_t use, int cluster) const {
    if (cluster == 1) return release(use);
    __syncwarp();
    if (!ptx::arrives_for_warp()) return;
    for (int rank = 0; rank < cluster; ++rank) ptx::barrier_arrive_in(empty_barrier(use), rank);
  }

  // Waits until use `use` of a stage has been released; whether it has.
  __device__ __forceinline__ void wait_released(uint32_t use) const {
    ptx::barrier_wait(empty_barrier(use), Block::phase(use));
  }
  __device__ __forceinline__ bool is_released(uint32_t use) const {
    return ptx::barrier_is_complete(empty_barrier(use), Block::phase(use));
  }

  // In a cluster the CTA `loader` multicasts into the same stage of all CTAs. Consumers release the stage at
  // the loader's barrier. The other producers only expect the bytes, for which the previous phase must be
  // over.
  template <int kCluster>
  __device__ __forceinline__ void release(uint32_t use, uint32_t loader) const {
    if constexpr (kCluster == 1) {
      release(use);
    } else {
      ptx::barrier_arrive_in_by_warp(empty_barrier(use), loader);
    }
  }
  template <int kCluster>
  __device__ __forceinline__ void wait_empty(uint32_t use, uint32_t loader) const {
    if (kCluster == 1 || ptx::cluster_rank() == loader) {
      wait_empty(use);
    } else {
      wait_previous_full(use);
    }
  }
};

}  // namespace jax_flash
