// Programmatic dependent launch (sm_90 and newer): a kernel that is launched so may start before the kernel
// before it in the stream has ended (launch_early() in cuda/launch.h).
#pragma once

namespace jax_flash::ptx {

#if __CUDA_ARCH__ >= 900

// The next kernel may start as soon as all CTAs of this kernel have called this or have ended.
__device__ __forceinline__ void let_next_kernel_start() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// Waits until the kernel before has ended and its writes are visible.
__device__ __forceinline__ void wait_for_kernel_before() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

#else

__device__ __forceinline__ void let_next_kernel_start() {}
__device__ __forceinline__ void wait_for_kernel_before() {}

#endif

}  // namespace jax_flash::ptx
