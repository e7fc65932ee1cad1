// The scales of float8 keys and values, for pools in which each page has a scale. Since K = k_scale · stored
// keys and V = v_scale · stored values, they are applied to S and to P.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/decode/partition.cuh"
#include "cuda/tile/accumulator.cuh"

namespace jax_flash::decode {

// The scales of a lane's keys in a tile, by S::column(n, e); 1 if all pages have the same scale. Empty unless
// kOn.
template <class S, bool kOn>
struct KeyScales {
  float key[S::kColumnTiles][2], value[S::kColumnTiles][2];

  // Loads the scales of the tile of keys from `first` on, before the wait for the tile, which takes longer.
  __device__ __forceinline__ void load(const DecodeCall& call, const ColumnRows& rows,
                                       const SequenceWork& work, int32_t first) {
#pragma unroll
    for (int n = 0; n < S::kColumnTiles; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int32_t page = call.scaled_by_page ? page_of(call, work, first + S::column(n, e)) : -1;
        key[n][e] = of_page(rows, work, call.k_scale, page);
        value[n][e] = of_page(rows, work, call.v_scale, page);
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

 private:
  // The page of a key; −1 if there is none.
  __device__ __forceinline__ static int32_t page_of(const DecodeCall& call, const SequenceWork& work,
                                                    int32_t key) {
    if (key < work.keys.lo || key >= work.keys.hi) return -1;
    const int32_t* const table = call.block_tables.at<const int32_t>(work.leading, work.index, 0, 0);
    const int32_t page = table[call.page_size.quotient(key)];
    return static_cast<uint32_t>(page) < static_cast<uint32_t>(call.pages) ? page : -1;
  }
  __device__ __forceinline__ static float of_page(const ColumnRows& rows, const SequenceWork& work,
                                                  const DecodeView& scale, int32_t page) {
    return page < 0 || scale.batch == 0 ? 1 : *scale.at<const float>(work.leading, page, rows.kv_head, 0);
  }
};

template <class S>
struct KeyScales<S, false> {
  __device__ __forceinline__ void load(const DecodeCall&, const ColumnRows&, const SequenceWork&,
                                       int32_t) const {}
  __device__ __forceinline__ void scale_keys(S&) const {}
  __device__ __forceinline__ float bounded(float x, int, int) const { return x; }
  __device__ __forceinline__ float scale_value(float p, int, int) const { return p; }
};

}  // namespace jax_flash::decode
