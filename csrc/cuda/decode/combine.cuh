// Merges the partial results of split sequences, in a fixed order. The kernel is so short that its launch is
// most of its time.
#pragma once

#include "cuda/decode/partition.cuh"
#include "cuda/decode/results.cuh"

namespace jax_flash::decode {

__device__ __forceinline__ float warp_max(float x) {
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
  return x;
}

// Block `index` of a column merges the sequence that range `index` begins and does not end, or sequence
// `index` where the call fixes the splits. Each warp takes a row, each lane four features of it at a time.
template <class C>
__global__ void __launch_bounds__(C::kThreads)
    combine(const __grid_constant__ Problem p, const __grid_constant__ DecodeGrid grid, void* workspace) {
  const PartialResults<C::kRows> partial(p, grid, workspace);
  const int32_t column = static_cast<int32_t>(blockIdx.x % grid.columns),
                index = static_cast<int32_t>(blockIdx.x / grid.columns);
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  for (int32_t row = warp; row < C::kRows; row += C::kWarps) {
    const OutputRow output = partial.outputs[partial.row(index, column, row)];
    const auto row_of_split = [&](int32_t i) {
      const int32_t range = grid.fixed_parts() ? 0 : index + i;
      return partial.row(partial_slot(grid, index, i, range), column, row);
    };
    if (output.splits == 0) continue;
    float m = -INFINITY;
    for (int32_t i = lane; i < output.splits; i += 32) m = fmaxf(m, partial.softmax[row_of_split(i)].m);
    m = warp_max(m);
    for (int32_t feature = 4 * lane; feature < p.value_dim; feature += 128) {
      float4 o = make_float4(0, 0, 0, 0);
      float l = 0;
#pragma unroll 4
      for (int32_t i = 0; i < output.splits; ++i) {
        const int64_t at = row_of_split(i);
        const Softmax part = partial.softmax[at];
        const float4 x = *reinterpret_cast<const float4*>(partial.o + at * partial.width + feature);
        const float w = merge_weight(part, m);  // 2^(m_i − m)
        l = fmaf(part.l, w, l);                 // l ← l + w l_i
        o.x = fmaf(x.x, w, o.x), o.y = fmaf(x.y, w, o.y), o.z = fmaf(x.z, w, o.z), o.w = fmaf(x.w, w, o.w);
      }
      output.store<typename C::Element>(p, feature, o, {m, l});
    }
  }
}

}  // namespace jax_flash::decode
