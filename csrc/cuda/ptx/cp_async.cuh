// cp.async: asynchronous copies from global to shared memory (sm_80 and newer). On sm_75 a copy goes through
// registers and is synchronous, so there is nothing to commit or to wait for.
#pragma once

#include <cstdint>

#include "cuda/ptx/shared.cuh"

namespace jax_flash::ptx {

// Which lines L2 evicts first: a cache policy of createpolicy.
struct L2Policy {
  uint64_t bits = 0;
};

#if __CUDA_ARCH__ >= 800

// Copies 16 bytes. When !valid nothing is read and zeros are written.
__device__ __forceinline__ void cp_async_16(uint32_t shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void cp_async_16(uint32_t shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}

// The policy that evicts a copy's lines first if `evict_first`, or the default.
__device__ __forceinline__ L2Policy l2_policy(bool evict_first) {
  L2Policy policy;
  if (evict_first) {
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy.bits));
  } else {
    asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy.bits));
  }
  return policy;
}
__device__ __forceinline__ void cp_async_16(uint32_t shared, const void* global, L2Policy policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
               "l"(policy.bits)
               : "memory");
}

// Likewise with a policy; zeros if !valid.
__device__ __forceinline__ void cp_async_16(uint32_t shared, const void* global, bool valid,
                                            L2Policy policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(shared), "l"(global),
               "r"(valid ? 16 : 0), "l"(policy.bits)
               : "memory");
}

// Copies 4 bytes, likewise.
__device__ __forceinline__ void cp_async_4(uint32_t shared, const void* global, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(global), "r"(valid ? 4 : 0)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the newest kPending groups of this thread are in flight.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

#else

__device__ __forceinline__ void cp_async_16(uint32_t shared, const void* global, bool valid) {
  store_shared(shared, valid ? *static_cast<const uint4*>(global) : uint4{});
}

__device__ __forceinline__ void cp_async_16(uint32_t shared, const void* global) {
  cp_async_16(shared, global, true);
}

__device__ __forceinline__ L2Policy l2_policy(bool) { return {}; }
__device__ __forceinline__ void cp_async_16(uint32_t shared, const void* global, L2Policy) {
  cp_async_16(shared, global, true);
}
__device__ __forceinline__ void cp_async_16(uint32_t shared, const void* global, bool valid, L2Policy) {
  cp_async_16(shared, global, valid);
}

__device__ __forceinline__ void cp_async_4(uint32_t shared, const void* global, bool valid) {
  store_shared(shared, valid ? *static_cast<const uint32_t*>(global) : 0u);
}

__device__ __forceinline__ void cp_async_commit() {}

template <int kPending>
__device__ __forceinline__ void cp_async_wait() {}

#endif

// Copies the first `used` of kBytes (8 or 16) bytes and fills the rest with zeros (sm_80 and newer).
template <int kBytes>
__device__ __forceinline__ void cp_async_part(uint32_t shared, const void* global, int used) {
  static_assert(kBytes == 8 || kBytes == 16);
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(used)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared), "l"(global), "r"(used)
                 : "memory");
  }
}

}  // namespace jax_flash::ptx
