// setmaxnreg (sm_90a) sets the registers per thread of a warpgroup. All warps of the warpgroup execute it.
#pragma once

namespace jax_flash::ptx {

template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace jax_flash::ptx
