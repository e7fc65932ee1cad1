// TMA (sm_90 and newer): copies boxes of a tensor to shared memory and counts their bytes at an mbarrier.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace jax_flash::ptx {

// arrive.expect_tx: this thread arrives, and the phase also waits for `bytes` bytes of copies.
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Makes barrier_init visible to TMA and to the cluster. It precedes the first copy.
__device__ __forceinline__ void fence_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Makes this thread's writes to shared memory visible to wgmma and TMA, which read through the async proxy.
__device__ __forceinline__ void fence_async_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// A box's first element, innermost dimension first.
struct Coordinates {
  int32_t column, head, row, batch, leading;
};

// Starts the copy of a box to `shared`. Elements outside the tensor become zeros.
__device__ __forceinline__ void copy_box(uint32_t shared, const CUtensorMap& map, uint32_t barrier,
                                         const Coordinates& at) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(shared),
      "l"(&map), "r"(barrier), "r"(at.column), "r"(at.head), "r"(at.row), "r"(at.batch), "r"(at.leading)
      : "memory");
}

}  // namespace jax_flash::ptx
