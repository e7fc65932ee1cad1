// Clusters (sm_90 and newer): blocks that reach each other's shared memory. An address in shared::cluster is
// one of 32 bits, as those of the block's own shared memory are.
//
// What arrives in another block does so without a scope: .release.cluster would be a fence of the whole
// device's, MEMBAR.ALL.GPU, and .acquire.cluster an L1 cleared (SASS of CUDA 13.0).
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/tma.cuh"

namespace jax_flash::ptx {

// The block's number in its cluster.
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t x;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(x));
  return x;
}

// Where what lies at `shared` here lies in a block of the cluster.
__device__ __forceinline__ uint32_t address_in(uint32_t shared, uint32_t rank) {
  uint32_t x;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(x) : "r"(shared), "r"(rank));
  return x;
}

// At the barrier of any block: after reads that are over, not after writes that others wait for.
__device__ __forceinline__ void barrier_arrive_in(uint32_t barrier, uint32_t rank) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(address_in(barrier, rank)) : "memory");
}

__device__ __forceinline__ void barrier_arrive_in_by_warp(uint32_t barrier, uint32_t rank) {
  __syncwarp();
  if (arrives_for_warp()) barrier_arrive_in(barrier, rank);
}

// To another block's shared memory; its barrier, in the same block, counts the 4 bytes.
__device__ __forceinline__ void store_in(uint32_t shared, uint32_t value, uint32_t barrier, uint32_t rank) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(
                   address_in(shared, rank)),
               "r"(value), "r"(address_in(barrier, rank))
               : "memory");
}

// As __syncthreads, for all blocks of the cluster; by whole warps.
__device__ __forceinline__ void sync_cluster() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}

// copy_box to the blocks of `blocks`, a bit for each: to the same place in each, and each one's own barrier
// counts the bytes.
__device__ __forceinline__ void copy_box_to(uint16_t blocks, uint32_t shared, const CUtensorMap& map,
                                            uint32_t barrier, const Coordinates& at) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(shared),
      "l"(&map), "r"(barrier), "r"(at.column), "r"(at.head), "r"(at.row), "r"(at.batch), "r"(at.leading),
      "h"(blocks)
      : "memory");
}

}  // namespace jax_flash::ptx
