// Merges the partial results of a split sequence, in a fixed order: by the block that finishes last or, over
// latent pools, by a kernel of its own (latent_combine.cuh).
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

// Merges the parts of a row. Each lane of a warp merges four features (`o`), and all of them the softmax.
// row_of(part): the index of the part's row in partial.softmax. The lanes compute the weights of 32 parts at
// a time, while the first kAtOnce parts are loaded.
template <int kAtOnce, int kRows, class RowOf>
__device__ __forceinline__ Softmax merge_parts(const PartialResults<kRows>& partial, int32_t parts,
                                               int32_t feature, RowOf row_of, float4& o) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  Softmax all{-INFINITY, 0};
  float weight = 0;  // 2^(m_i − m) of part i, in lane i % 32
  o = make_float4(0, 0, 0, 0);
#pragma unroll 1
  for (int32_t first = 0; first < parts; first += kAtOnce) {
    const int32_t count = parts - first;
    float2 own = make_float2(-INFINITY, 0);
    if (first % 32 == 0 && lane < count)
      own =
          ptx::load_shared_by_blocks(reinterpret_cast<const float2*>(partial.softmax + row_of(first + lane)));
    float4 x[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (i < count)
        x[i] = ptx::load_shared_by_blocks(
            reinterpret_cast<const float4*>(partial.o + row_of(first + i) * partial.width + feature));
    }
    if (first % 32 == 0) {
      const float m = fmaxf(all.m, warp_max(own.x)), alpha = merge_weight(all, m);
      weight = merge_weight({own.x, own.y}, m);
      all = {m, fmaf(all.l, alpha, warp_sum(own.y * weight))};
      scale(o, alpha);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const float w = __shfl_sync(~0u, weight, first + i);
      if (i < count) o = fma(x[i], w, o);
    }
  }
  return all;
}

// Merges 128 features of a row, from `feature` on, by one warp.
template <class T, int kAtOnce, int kRows>
__device__ __forceinline__ void combine_row(const DecodeCall& call, const ColumnRows& rows,
                                            const SequenceWork& work, const PartialResults<kRows>& partial,
                                            const Parts& parts, int32_t column, int32_t row,
                                            int32_t feature) {
  // The slots of parts have a constant stride, except for the first part if the splits are not fixed.
  const int64_t apart = int64_t{partial.columns} * kRows * (call.grid.fixed_parts() ? 1 : 2);
  const int64_t row_0 = partial.row(parts.slot(call.grid, 0), column, row);
  const int64_t row_1 = partial.row(parts.slot(call.grid, 1), column, row) - apart;
  feature += 4 * static_cast<int32_t>(threadIdx.x % 32);
  float4 o;
  const Softmax all = merge_parts<kAtOnce>(
      partial, parts.count, min(feature, call.value_dim - 4),
      [&](int32_t part) { return part == 0 ? row_0 : row_1 + part * apart; }, o);
  if (feature < call.value_dim) store_result<T>(call, rows, work, row, feature, o, all);
}

// Merges the rows of a sequence. C: DecodeShares. The code is short, because it runs once and has to be
// fetched from memory.
template <class C, int kAtOnce>
__device__ __forceinline__ void combine(const DecodeCall& call, const ColumnRows& rows,
                                        const SequenceWork& work, const PartialResults<C::kRows>& partial,
                                        const Parts& parts, int32_t column) {
#pragma unroll 1
  for (int32_t row = static_cast<int32_t>(threadIdx.x / 32); row < rows.count(); row += C::kWarps) {
    if (!is_written(call, rows, work, row)) continue;
#pragma unroll 1
    for (int32_t feature = 0; feature < call.value_dim; feature += 128)
      combine_row<typename C::Element, kAtOnce>(call, rows, work, partial, parts, column, row, feature);
  }
}

}  // namespace jax_flash::decode
