// cp.async: global to shared memory without registers (sm_80 and newer). On sm_75 a copy goes through
// registers and is done when it has been issued: nothing is left to wait for.
#pragma once

#include <cstdint>

#include "cuda/ptx/shared.cuh"

namespace jax_flash::ptx {

#if __CUDA_ARCH__ >= 800

// 16 bytes; zeros, and nothing is read, when !valid.
__device__ __forceinline__ void cp_async_16(uint32_t shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}

// 4 bytes, in the same way.
__device__ __forceinline__ void cp_async_4(uint32_t shared, const void* global, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(global), "r"(valid ? 4 : 0)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most `kPending` of this thread's newest groups are in flight.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

#else

__device__ __forceinline__ void cp_async_16(uint32_t shared, const void* global, bool valid) {
  store_shared(shared, valid ? *static_cast<const uint4*>(global) : uint4{});
}

__device__ __forceinline__ void cp_async_4(uint32_t shared, const void* global, bool valid) {
  store_shared(shared, valid ? *static_cast<const uint32_t*>(global) : 0u);
}

__device__ __forceinline__ void cp_async_commit() {}

template <int kPending>
__device__ __forceinline__ void cp_async_wait() {}

#endif

}  // namespace jax_flash::ptx
