// The copy engine (TMA, sm_90 and newer): boxes of a tensor to shared memory, whose bytes a barrier counts.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace jax_flash::ptx {

// This thread arrives, and the phase ends no sooner than `bytes` have come.
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// After barrier_init, before any copy counts on the barriers.
__device__ __forceinline__ void fence_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// What this thread wrote to shared memory, before the tensor cores and the copy engine read it.
__device__ __forceinline__ void fence_async_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Where a box begins, the innermost dimension first.
struct Coordinates {
  int32_t column, head, row, batch, leading;
};

// Starts the copy of the map's box; what lies outside the tensor is zero.
__device__ __forceinline__ void copy_box(uint32_t shared, const CUtensorMap& map, uint32_t barrier,
                                         const Coordinates& at) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(shared),
      "l"(&map), "r"(barrier), "r"(at.column), "r"(at.head), "r"(at.row), "r"(at.batch), "r"(at.leading)
      : "memory");
}

}  // namespace jax_flash::ptx
