// Predicated accesses to global memory. Unlike accesses in an if they need no branch. They have no "memory"
// clobber, so the compiler does not reload what it has read from shared memory before a store.
#pragma once

#include <cstdint>

namespace jax_flash::ptx {

// Stores 16 bytes at a multiple of 16 if `used`.
__device__ __forceinline__ void store_global(void* to, const uint4& x, bool used) {
  asm volatile(
      "{.reg .pred used; setp.ne.s32 used, %5, 0; @used st.global.v4.b32 [%0], {%1, %2, %3, %4};}" ::"l"(to),
      "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w), "r"(static_cast<int>(used)));
}

__device__ __forceinline__ void store_global(float* to, float2 x, bool used) {
  asm volatile("{.reg .pred used; setp.ne.s32 used, %3, 0; @used st.global.v2.f32 [%0], {%1, %2};}" ::"l"(to),
               "f"(x.x), "f"(x.y), "r"(static_cast<int>(used)));
}

__device__ __forceinline__ void store_global(float* to, float x, bool used) {
  asm volatile("{.reg .pred used; setp.ne.s32 used, %2, 0; @used st.global.f32 [%0], %1;}" ::"l"(to), "f"(x),
               "r"(static_cast<int>(used)));
}

// Loads *from if `used`, else returns `otherwise`. No kernel may write to that memory (ld.global.nc).
__device__ __forceinline__ float load_global(const float* from, bool used, float otherwise) {
  float x = otherwise;
  asm("{.reg .pred used; setp.ne.s32 used, %2, 0; @used ld.global.nc.f32 %0, [%1];}"
      : "+f"(x)
      : "l"(from), "r"(static_cast<int>(used)));
  return x;
}

}  // namespace jax_flash::ptx
