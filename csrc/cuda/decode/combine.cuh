// Merges the partial results of a split sequence, in a fixed order, by the block that finishes last.
#pragma once

#include <cstdint>

#include "cuda/decode/partition.cuh"
#include "cuda/decode/results.cuh"
#include "cuda/warp.cuh"

namespace jax_flash::decode {

// scale: x ← x · factor; the other function also adds y
__device__ __forceinline__ void scale(float4& x, float factor) {
  x.x *= factor, x.y *= factor, x.z *= factor, x.w *= factor;
}
__device__ __forceinline__ float4 fma(const float4& x, float factor, const float4& y) {
  return make_float4(fmaf(x.x, factor, y.x), fmaf(x.y, factor, y.y), fmaf(x.z, factor, y.z),
                     fmaf(x.w, factor, y.w));
}

// Merges the parts of a row. The lanes that share the row each merge four features at each of `features`
// (`o`) and the softmax of all parts. row_of(part): the index of the part's row in partial.softmax. The lanes
// compute the weights of 32 parts at a time, while the first kAtOnce parts are loaded.
template <int kAtOnce, int kBlocks, int kRows, class RowOf>
__device__ __forceinline__ Softmax merge_parts(const PartialResults<kRows>& partial, int32_t parts,
                                               const int32_t (&features)[kBlocks], RowOf row_of,
                                               float4 (&o)[kBlocks]) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  Softmax all{-INFINITY, 0};
  float weight = 0;  // 2^(m_i − m) of part i, in lane i % 32
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) o[b] = make_float4(0, 0, 0, 0);
#pragma unroll 1
  for (int32_t first = 0; first < parts; first += kAtOnce) {
    const int32_t count = parts - first;
    float2 own = make_float2(-INFINITY, 0);
    if (first % 32 == 0 && lane < count)
      own =
          ptx::load_shared_by_blocks(reinterpret_cast<const float2*>(partial.softmax + row_of(first + lane)));
    float4 x[kAtOnce][kBlocks];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (i >= count) continue;
      const float* const from = partial.o + row_of(first + i) * partial.width;
#pragma unroll
      for (int b = 0; b < kBlocks; ++b)
        x[i][b] = ptx::load_shared_by_blocks(reinterpret_cast<const float4*>(from + features[b]));
    }
    if (first % 32 == 0) {
      const float m = fmaxf(all.m, warp_max(own.x)), alpha = merge_weight(all, m);
      weight = merge_weight({own.x, own.y}, m);
      all = {m, fmaf(all.l, alpha, warp_sum(own.y * weight))};
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) scale(o[b], alpha);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const float w = __shfl_sync(~0u, weight, first + i);
#pragma unroll
      for (int b = 0; b < kBlocks; ++b)
        if (i < count) o[b] = fma(x[i][b], w, o[b]);
    }
  }
  return all;
}

// Likewise for four features, in the fewest registers: the weights of 32 parts are computed before the parts
// are loaded.
template <int kRows, class RowOf>
__device__ __forceinline__ Softmax merge_parts_in_turn(const PartialResults<kRows>& partial, int32_t parts,
                                                       int32_t feature, RowOf row_of, float4& o) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  Softmax all{-INFINITY, 0};
  o = make_float4(0, 0, 0, 0);
#pragma unroll 1
  for (int32_t first = 0; first < parts; first += 32) {
    const int32_t count = min(32, parts - first);
    float2 own = make_float2(-INFINITY, 0);
    if (lane < count)
      own =
          ptx::load_shared_by_blocks(reinterpret_cast<const float2*>(partial.softmax + row_of(first + lane)));
    const float m = fmaxf(all.m, warp_max(own.x)), alpha = merge_weight(all, m);
    const float weight = merge_weight({own.x, own.y}, m);  // 2^(m_i − m)
    all = {m, fmaf(all.l, alpha, warp_sum(own.y * weight))};
    scale(o, alpha);
#pragma unroll 8
    for (int32_t i = 0; i < count; ++i) {
      const float w = __shfl_sync(~0u, weight, i);
      const float4 x = ptx::load_shared_by_blocks(
          reinterpret_cast<const float4*>(partial.o + row_of(first + i) * partial.width + feature));
      o = fma(x, w, o);
    }
  }
  return all;
}

// C: DecodeShares or a kernel of latent pools. kAtOnce: the parts that are loaded together; 0: one after the
// other. Each warp merges a row, and each lane four features in each of kBlocks blocks of 128 at a time. The
// code is short, because it runs once and has to be fetched from memory.
template <class C, int kAtOnce = 0, int kBlocks = 1>
__device__ __forceinline__ void combine(const DecodeCall& call, const ColumnRows& rows,
                                        const SequenceWork& work, const PartialResults<C::kRows>& partial,
                                        const Parts& parts, int32_t column) {
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
#pragma unroll 1
  for (int32_t row = warp; row < rows.count(); row += C::kWarps) {
    if (!is_written(call, rows, work, row)) continue;
    // The slots of parts have a constant stride, except for the first part if the splits are not fixed.
    const int64_t apart = int64_t{partial.columns} * C::kRows * (call.grid.fixed_parts() ? 1 : 2);
    const int64_t row_0 = partial.row(parts.slot(call.grid, 0), column, row);
    const int64_t row_1 = partial.row(parts.slot(call.grid, 1), column, row) - apart;
    const auto row_of = [&](int32_t part) { return part == 0 ? row_0 : row_1 + part * apart; };
#pragma unroll 1
    for (int32_t first_feature = 0; first_feature < call.value_dim; first_feature += 128 * kBlocks) {
      int32_t features[kBlocks];
#pragma unroll
      for (int b = 0; b < kBlocks; ++b)
        features[b] = min(first_feature + 128 * b + 4 * lane, call.value_dim - 4);
      float4 o[kBlocks];
      Softmax all;
      if constexpr (kAtOnce > 0) {
        all = merge_parts<kAtOnce>(partial, parts.count, features, row_of, o);
      } else {
        all = merge_parts_in_turn(partial, parts.count, features[0], row_of, o[0]);
      }
#pragma unroll
      for (int b = 0; b < kBlocks; ++b)
        if (first_feature + 128 * b + 4 * lane < call.value_dim)
          store_result<typename C::Element>(call, rows, work, row, features[b], o[b], all);
    }
  }
}

}  // namespace jax_flash::decode
