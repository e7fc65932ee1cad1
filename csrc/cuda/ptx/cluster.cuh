// Thread block clusters (sm_90 and newer) and distributed shared memory. A shared::cluster address has 32
// bits, as a shared::cta address does.
//
// Remote arrivals carry no scope qualifier: CUDA 13.0 compiles .release.cluster to MEMBAR.ALL.GPU, a fence
// for the whole device, and .acquire.cluster to an invalidation of L1.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/tma.cuh"

namespace jax_flash::ptx {

// The CTA's rank in its cluster.
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t x;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(x));
  return x;
}

// The number of CTAs in the cluster.
__device__ __forceinline__ uint32_t cluster_ctas() {
  uint32_t x;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(x));
  return x;
}

// mapa: the shared::cluster address of `shared` in CTA `rank` of the cluster.
__device__ __forceinline__ uint32_t address_in(uint32_t shared, uint32_t rank) {
  uint32_t x;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(x) : "r"(shared), "r"(rank));
  return x;
}

// Arrives at the barrier of CTA `rank`. This publishes no writes. It may signal that wgmma has read, after
// wgmma_wait(), but loads may return after it: see address_after().
__device__ __forceinline__ void barrier_arrive_in(uint32_t barrier, uint32_t rank) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(address_in(barrier, rank)) : "memory");
}

__device__ __forceinline__ void barrier_arrive_in_by_warp(uint32_t barrier, uint32_t rank) {
  __syncwarp();
  if (arrives_for_warp()) barrier_arrive_in(barrier, rank);
}

// `address`, known only once a load of `word` has returned. A CTA's accesses to its own shared memory stay in
// order, but an arrival at a barrier of another CTA may overtake loads that were issued before it, and what
// the other CTA then stores may overtake them, too. The compiler does not know that ranks are below 16.
__device__ __forceinline__ uint32_t address_after(uint32_t address, uint32_t word) {
  return address + (word & cluster_rank() >> 4);
}

// st.async: stores to the shared memory of CTA `rank`, whose barrier counts the 4 bytes.
__device__ __forceinline__ void store_in(uint32_t shared, uint32_t value, uint32_t barrier, uint32_t rank) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(
                   address_in(shared, rank)),
               "r"(value), "r"(address_in(barrier, rank))
               : "memory");
}

// The same for 16 or 8 bytes, with addresses that address_in() has returned, or that lie a distance behind
// them.
__device__ __forceinline__ void store_at(uint32_t address, const float4& x, uint32_t barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
          address),
      "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w), "r"(barrier)
      : "memory");
}
__device__ __forceinline__ void store_at(uint32_t address, const uint4& x, uint32_t barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.u32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
          address),
      "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w), "r"(barrier)
      : "memory");
}
__device__ __forceinline__ void store_at(uint32_t address, const float2& x, uint32_t barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(address),
      "f"(x.x), "f"(x.y), "r"(barrier)
      : "memory");
}
// The same as store_in for 16 bytes and for 8.
__device__ __forceinline__ void store_in(uint32_t shared, const float4& x, uint32_t barrier, uint32_t rank) {
  store_at(address_in(shared, rank), x, address_in(barrier, rank));
}
__device__ __forceinline__ void store_in(uint32_t shared, const float2& x, uint32_t barrier, uint32_t rank) {
  store_at(address_in(shared, rank), x, address_in(barrier, rank));
}

// Starts the copy of bytes of this CTA's shared memory to the same place in that of CTA `rank`, whose barrier
// counts them. Their number and the address are multiples of 16.
__device__ __forceinline__ void copy_bytes_in(uint32_t shared, uint32_t bytes, uint32_t barrier,
                                              uint32_t rank) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          address_in(shared, rank)),
      "r"(shared), "r"(bytes), "r"(address_in(barrier, rank))
      : "memory");
}

// __syncthreads for all CTAs of the cluster. Whole warps call it.
__device__ __forceinline__ void sync_cluster() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}

// The two halves of sync_cluster(). They order nothing but barriers that fence_barriers() has made visible.
__device__ __forceinline__ void arrive_at_cluster() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void wait_for_cluster() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The two halves of sync_cluster() for warps whose lanes may have diverged. A warp arrives once. In a launch
// without clusters the second half is a barrier of all threads of the CTA.
__device__ __forceinline__ void release_to_cluster() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void acquire_from_cluster() {
  __syncwarp();
  wait_for_cluster();
}

// sync_cluster() for warps whose lanes need not have converged.
__device__ __forceinline__ void sync_cluster_of_any_lanes() {
  asm volatile(
      "barrier.cluster.arrive.release;\n"
      "barrier.cluster.wait.acquire;" ::
          : "memory");
}

// copy_box with multicast to the CTAs in the bit mask `blocks`: the box goes to the same offset in the shared
// memory of each, and each CTA's own barrier counts the bytes.
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
