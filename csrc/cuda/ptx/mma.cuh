// mma.sync with float32 accumulators: m16n8k16 for 16-bit operands, and m16n8k8 for float32 operands, which
// takes three TF32 products. sm_75 has neither bfloat16 nor TF32: there float16 takes two m16n8k8 products,
// and float32 runs on the FMA units.
//
// Fragments of lane l, with g = l / 4 and t = l % 4:
//   A [16, 16]: a0 = (g, 2t..), a1 = (g + 8, 2t..), a2 = (g, 2t + 8..), a3 = (g + 8, 2t + 8..)
//   B [16, 8]:  b0 = (2t.., g), b1 = (2t + 8.., g)
//   C [16, 8]:  c0, c1 = (g, 2t..), c2, c3 = (g + 8, 2t..)
// For float32, A is [16, 8] and B is [8, 8]; a register holds one element at t instead of the pair at 2t..,
// and 4 replaces 8 along k.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/ptx/mma_steps.cuh"

namespace jax_flash::ptx {

#if __CUDA_ARCH__ >= 800

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

__device__ __forceinline__ void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Each element as high, the nearest TF32, and low = x − high, of which mma ignores the lower 13 bits: the
// relative error is 2⁻²¹. cvt.rna.tf32 is five instructions on sm_90, so integer arithmetic rounds. It may
// lose a NaN in `high`, but never in `low`.
template <int kCount>
struct Operand<float, kCount> {
  uint32_t high[kCount], low[kCount];
  __device__ __forceinline__ void set(const uint32_t (&x)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      high[i] = (x[i] + 0x1000u) & ~0x1FFFu;
      low[i] = __float_as_uint(__uint_as_float(x[i]) - __uint_as_float(high[i]));
    }
  }
};

// A B ≈ high · high + high · low + low · high. Few steps are accumulated in the tensor core, which truncates
// when it adds: over many steps that error would be visible.
template <int kSteps>
__device__ __forceinline__ void mma_steps(float (&c)[4], const Operand<float, 4> (&a)[kSteps],
                                          const Operand<float, 2> (&b)[kSteps]) {
  float sum[4] = {};
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    mma_tf32(sum, a[i].low, b[i].high);
    mma_tf32(sum, a[i].high, b[i].low);
    mma_tf32(sum, a[i].high, b[i].high);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) c[i] += sum[i];
}

template <>
__device__ __forceinline__ void mma<float>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Operand<float, 4> as[1];
  Operand<float, 2> bs[1];
  as[0].set(a), bs[0].set({b0, b1});
  mma_steps(c, as, bs);
}

#else

__device__ __forceinline__ void mma_half(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(b));
}

template <>
__device__ __forceinline__ void mma<__half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma_half(c, a[0], a[1], b0);
  mma_half(c, a[2], a[3], b1);
}

// Each lane computes its own elements of C and fetches A and B from the lanes that hold them.
template <>
__device__ __forceinline__ void mma<float>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const int lane = static_cast<int>(threadIdx.x % 32), row = lane & ~3, column = lane % 4 * 8;
  const auto from = [](uint32_t x, int holder) { return __uint_as_float(__shfl_sync(~0u, x, holder)); };
  float step[4] = {};
  const auto add = [&](float upper, float lower, float first, float second) {
    step[0] = fmaf(upper, first, step[0]);
    step[1] = fmaf(upper, second, step[1]);
    step[2] = fmaf(lower, first, step[2]);
    step[3] = fmaf(lower, second, step[3]);
  };
#pragma unroll 1  // a kernel contains hundreds of these loops
  for (int k = 0; k < 4; ++k) {
    add(from(a[0], row + k), from(a[1], row + k), from(b0, column + k), from(b0, column + 4 + k));
    add(from(a[2], row + k), from(a[3], row + k), from(b1, column + k), from(b1, column + 4 + k));
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) c[i] += step[i];
}

#endif

}  // namespace jax_flash::ptx
