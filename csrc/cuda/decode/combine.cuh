// Merges the partial results of a split sequence, in a fixed order, by the block that finishes last.
#pragma once

#include <cstdint>

#include "cuda/decode/partition.cuh"
#include "cuda/decode/results.cuh"

namespace jax_flash::decode {

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
  return x;
}
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

// C: DecodeSm80. Each warp takes a row, each lane four features of it at a time. 32 parts are merged at a
// time, whose weights the lanes hold; the code is short, since it runs once.
template <class C>
__device__ __forceinline__ void combine(const DecodeCall& call, const ColumnRows& rows,
                                        const SequenceWork& work, const PartialResults<C::kRows>& partial,
                                        const Parts& parts, int32_t column) {
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
#pragma unroll 1
  for (int32_t row = warp; row < rows.count(); row += C::kWarps) {
    if (!is_written(call, rows, work, row)) continue;
    // The slots of parts are as far apart as one another, but for the first where parts are not fixed.
    const int64_t apart = int64_t{partial.columns} * C::kRows * (call.grid.fixed_parts() ? 1 : 2);
    const int64_t row_0 = partial.row(parts.slot(call.grid, 0), column, row);
    const int64_t row_1 = partial.row(parts.slot(call.grid, 1), column, row) - apart;
    const auto row_of = [&](int32_t part) { return part == 0 ? row_0 : row_1 + part * apart; };
#pragma unroll 1
    for (int32_t first_feature = 0; first_feature < call.value_dim; first_feature += 128) {
      const int32_t feature = min(first_feature + 4 * lane, call.value_dim - 4);
      Softmax all{-INFINITY, 0};
      float4 o = make_float4(0, 0, 0, 0);
#pragma unroll 1
      for (int32_t first = 0; first < parts.count; first += 32) {
        const int32_t count = min(32, parts.count - first);
        float2 own = make_float2(-INFINITY, 0);
        if (lane < count)
          own = ptx::load_shared_by_blocks(
              reinterpret_cast<const float2*>(partial.softmax + row_of(first + lane)));
        const float m = fmaxf(all.m, warp_max(own.x)), alpha = merge_weight(all, m);
        const float weight = merge_weight({own.x, own.y}, m);  // 2^(m_i − m)
        all = {m, fmaf(all.l, alpha, warp_sum(own.y * weight))};
        o.x *= alpha, o.y *= alpha, o.z *= alpha, o.w *= alpha;
#pragma unroll 8
        for (int32_t i = 0; i < count; ++i) {
          const float w = __shfl_sync(~0u, weight, i);
          const float4 x = ptx::load_shared_by_blocks(
              reinterpret_cast<const float4*>(partial.o + row_of(first + i) * partial.width + feature));
          o.x = fmaf(x.x, w, o.x), o.y = fmaf(x.y, w, o.y), o.z = fmaf(x.z, w, o.z), o.w = fmaf(x.w, w, o.w);
        }
      }
      if (first_feature + 4 * lane < call.value_dim)
        store_result<typename C::Element>(call, rows, work, row, feature, o, all);
    }
  }
}

}  // namespace jax_flash::decode
