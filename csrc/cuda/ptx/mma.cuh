// mma.sync with float32 accumulators (sm_80 and newer): 16-bit operands, m16n8k16, and float32 operands as
// three products of TF32, m16n8k8.
//
// Fragments of lane l, with g = l / 4 and t = l % 4:
//   A [16, 16]: a0 = (g, 2t..), a1 = (g + 8, 2t..), a2 = (g, 2t + 8..), a3 = (g + 8, 2t + 8..)
//   B [16, 8]:  b0 = (2t.., g), b1 = (2t + 8.., g)
//   C [16, 8]:  c0, c1 = (g, 2t..), c2, c3 = (g + 8, 2t..)
// float32, A [16, 8] and B [8, 8]: the same with one element t in the place of the pair 2t.., and 4 for 8.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace jax_flash::ptx {

template <class T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void mma<__half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void mma<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                                   uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Splits float32 into the TF32 nearest to it and the TF32 nearest to the rest.
template <int kCount>
struct SplitTf32 {
  uint32_t high[kCount], low[kCount];
  __device__ __forceinline__ explicit SplitTf32(const uint32_t (&x)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      high[i] = to_tf32(__uint_as_float(x[i]));
      low[i] = to_tf32(__uint_as_float(x[i]) - __uint_as_float(high[i]));
    }
  }
};

// A B = high · high + high · low + low · high, 2⁻²² away from the product. The sum over k is made outside:
// tensor cores cut off where they add, and over many steps that is seen.
template <>
__device__ __forceinline__ void mma<float>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const SplitTf32<4> as(a);
  const SplitTf32<2> bs({b0, b1});
  float step[4] = {};
  mma_tf32(step, as.low, bs.high);
  mma_tf32(step, as.high, bs.low);
  mma_tf32(step, as.high, bs.high);
#pragma unroll
  for (int i = 0; i < 4; ++i) c[i] += step[i];
}

}  // namespace jax_flash::ptx
