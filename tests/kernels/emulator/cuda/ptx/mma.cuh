// csrc/cuda/ptx/mma.cuh on the emulator.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/ptx/mma_steps.cuh"
#include "emulator.h"

namespace jax_flash::ptx {

template <class T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Argument {
    float* c;
    const uint32_t* a;
    uint32_t b[2];
  } argument{c, a, {b0, b1}};
  emulator::warp_collective(&argument, [](void* const(&all)[32]) {
    float a[16][16], b[16][8];
    auto unpack = [](uint32_t pair, int i) {
      const uint16_t bits = static_cast<uint16_t>(pair >> 16 * i);
      T x;
      std::memcpy(&x, &bits, 2);
      return static_cast<float>(x);
    };
    for (int lane = 0; lane < 32; ++lane) {
      const auto* from = static_cast<const Argument*>(all[lane]);
      const int g = lane / 4, t = lane % 4 * 2;
      for (int i = 0; i < 2; ++i) {
        a[g][t + i] = unpack(from->a[0], i);
        a[g + 8][t + i] = unpack(from->a[1], i);
        a[g][t + 8 + i] = unpack(from->a[2], i);
        a[g + 8][t + 8 + i] = unpack(from->a[3], i);
        b[t + i][g] = unpack(from->b[0], i);
        b[t + 8 + i][g] = unpack(from->b[1], i);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      float* c = static_cast<const Argument*>(all[lane])->c;
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; ++k) c[i] += a[row][k] * b[k][column];
      }
    }
  });
}

// The part of an operand that the three TF32 products see.
inline float to_two_tf32(uint32_t bits) {
  const float high = __uint_as_float((bits + 0x1000) & ~0x1FFFu), rest = __uint_as_float(bits) - high;
  return high + __uint_as_float(__float_as_uint(rest) & ~0x1FFFu);
}

template <>
__device__ __forceinline__ void mma<float>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Argument {
    float* c;
    const uint32_t* a;
    uint32_t b[2];
  } argument{c, a, {b0, b1}};
  emulator::warp_collective(&argument, [](void* const(&all)[32]) {
    float a[16][8], b[8][8];
    for (int lane = 0; lane < 32; ++lane) {
      const auto* from = static_cast<const Argument*>(all[lane]);
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 4; ++i) a[g + i % 2 * 8][t + i / 2 * 4] = to_two_tf32(from->a[i]);
      for (int i = 0; i < 2; ++i) b[t + i * 4][g] = to_two_tf32(from->b[i]);
    }
    for (int lane = 0; lane < 32; ++lane) {
      float* c = static_cast<const Argument*>(all[lane])->c;
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 8; ++k) c[i] += a[row][k] * b[k][column];
      }
    }
  });
}

}  // namespace jax_flash::ptx
