// TMA (sm_90 and newer): copies boxes of a tensor, or contiguous bytes, between global and shared memory. An
// mbarrier counts the bytes of loads; a bulk group tracks stores and reductions.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/ptx/atomic.cuh"

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

// Loads contiguous bytes. Their number and both addresses are multiples of 16.
__device__ __forceinline__ void copy_bytes(uint32_t shared, const void* from, uint32_t bytes,
                                           uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}

// Stores contiguous bytes, under the same conditions. Part of the thread's current bulk group.
__device__ __forceinline__ void store_bytes(void* to, uint32_t shared, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(shared),
               "r"(bytes)
               : "memory");
}

// Adds float32 in shared memory to those at `to`, under the same conditions. Part of the thread's current
// bulk group.
__device__ __forceinline__ void reduce_add_floats(float* to, uint32_t shared, uint32_t bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to),
               "r"(shared), "r"(bytes)
               : "memory");
}

// Stores a box from shared memory, without elements outside the tensor. Part of the thread's current
// bulk group.
__device__ __forceinline__ void store_box(const CUtensorMap& map, uint32_t shared, const Coordinates& at) {
  asm volatile(
      "cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5, %6}], "
      "[%1];" ::"l"(&map),
      "r"(shared), "r"(at.column), "r"(at.head), "r"(at.row), "r"(at.batch), "r"(at.leading)
      : "memory");
}

__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until at most `kPending` of this thread's newest bulk groups are in flight. bulk_wait() waits for all
// of their work, bulk_wait_read() only for their reads of shared memory.
template <int kPending>
__device__ __forceinline__ void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}
template <int kPending>
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// A counter in global memory that one CTA raises and others wait for. All that precedes the addition,
// including bulk groups that were waited for, is visible to all that follows the wait, including bulk copies.
__device__ __forceinline__ void raise_count(uint32_t* count) {
  asm volatile("fence.proxy.async.global;" ::: "memory");
  raise_by_thread(count);
}
__device__ __forceinline__ void wait_count(const uint32_t* count, uint32_t wanted) {
  wait_at_least(count, wanted);
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

}  // namespace jax_flash::ptx
