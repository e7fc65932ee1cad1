// The scales of float8 keys and values, for pools in which each page has a scale. Since K = k_scale · stored
// keys and V = v_scale · stored values, they are applied to S and to P.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/ptx/shared.cuh"
#include "cuda/tile/accumulator.cuh"

namespace jax_flash::decode {

// The scales of a lane's keys in a tile, by S::column(n, e); 1 if all pages have the same scale. Empty unless
// kOn.
template <class S, bool kOn>
struct KeyScales {
  float key[S::kColumnTiles][2], value[S::kColumnTiles][2];

  // Loads the scales of a tile from shared memory: float32 [2, S::kColumns], of keys and of values. by_page:
  // whether pages have scales.
  __device__ __forceinline__ void load(bool by_page, uint32_t scales) {
#pragma unroll
    for (int n = 0; n < S::kColumnTiles; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const uint32_t at = scales + S::column(n, e) * 4;
        key[n][e] = by_page ? ptx::load_shared_float(at) : 1;
        value[n][e] = by_page ? ptx::load_shared_float(at + S::kColumns * 4) : 1;
      }
  }
  // S ← k_scale · S
  __device__ __forceinline__ void scale_keys(S& s) const {
    for_each(s, [&](float& x, int, int n, int e) { x *= key[n][e]; });
  }
  // The number that P's bound must exceed: log2(v_scale · 2^S).
  __device__ __forceinline__ float bounded(float x, int n, int e) const {
    constexpr float kSmallest = 0x1p-100f;  // keeps Σ 2^(S − m) from overflowing if a scale is 0
    return x + log2f(fmaxf(fabsf(value[n][e]), kSmallest));
  }
  // P ← v_scale · P
  __device__ __forceinline__ float scale_value(float p, int n, int e) const { return p * value[n][e]; }
};

template <class S>
struct KeyScales<S, false> {
  __device__ __forceinline__ void load(bool, uint32_t) const {}
  __device__ __forceinline__ void scale_keys(S&) const {}
  __device__ __forceinline__ float bounded(float x, int, int) const { return x; }
  __device__ __forceinline__ float scale_value(float p, int, int) const { return p; }
};

}  // namespace jax_flash::decode
