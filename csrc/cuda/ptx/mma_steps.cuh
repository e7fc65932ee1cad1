// Steps of mma on prepared fragments, so that one that meets many others is prepared once.
#pragma once

#include <cstdint>

namespace jax_flash::ptx {

template <class T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

// A fragment in the form that mma.sync takes.
template <class T, int kCount>
struct Operand {
  uint32_t x[kCount];
  __device__ __forceinline__ void set(const uint32_t (&from)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = from[i];
  }
};

// C += A B over kSteps steps of mma.
template <class T, int kSteps>
__device__ __forceinline__ void mma_steps(float (&c)[4], const Operand<T, 4> (&a)[kSteps],
                                          const Operand<T, 2> (&b)[kSteps]) {
#pragma unroll
  for (int i = 0; i < kSteps; ++i) mma<T>(c, a[i].x, b[i].x[0], b[i].x[1]);
}

}  // namespace jax_flash::ptx
