// Joins the parts of the sequences that decode has cut, in order. Short: most of its time is its start.
#pragma once

#include "cuda/decode/results.cuh"
#include "cuda/decode/schedule.cuh"

namespace jax_flash::decode {

__device__ __forceinline__ float warp_max(float x) {
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
  return x;
}

// Block `index` of a column: the sequence that the column's range `index` has begun and not ended, or
// sequence `index` where parts are given. A warp takes a row, a lane four features of it at a time.
template <class C>
__global__ void __launch_bounds__(C::kThreads)
    combine(const __grid_constant__ Problem p, const __grid_constant__ DecodeGrid grid, void* workspace) {
  const Parts<C::kRows> parts(p, grid, workspace);
  const int32_t column = static_cast<int32_t>(blockIdx.x % grid.columns),
                index = static_cast<int32_t>(blockIdx.x / grid.columns);
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  for (int32_t row = warp; row < C::kRows; row += C::kWarps) {
    const Target target = parts.targets[parts.row(index, column, row)];
    const auto part = [&](int32_t i) {
      const int32_t range = grid.fixed_parts() ? 0 : index + i;
      return parts.row(slot_of(grid, index, i, range), column, row);
    };
    if (target.parts == 0) continue;
    float m = -INFINITY;
    for (int32_t i = lane; i < target.parts; i += 32) m = fmaxf(m, parts.softmax[part(i)].m);
    m = warp_max(m);
    for (int32_t feature = 4 * lane; feature < p.value_dim; feature += 128) {
      float4 o = make_float4(0, 0, 0, 0);
      float l = 0;
#pragma unroll 4
      for (int32_t i = 0; i < target.parts; ++i) {
        const int64_t at = part(i);
        const Softmax own = parts.softmax[at];
        const float4 x = *reinterpret_cast<const float4*>(parts.o + at * parts.width + feature);
        const float w = weight(own, m);
        l = fmaf(own.l, w, l);
        o.x = fmaf(x.x, w, o.x), o.y = fmaf(x.y, w, o.y), o.z = fmaf(x.z, w, o.z), o.w = fmaf(x.w, w, o.w);
      }
      target.store<typename C::Element>(p, feature, o, {m, l});
    }
  }
}

}  // namespace jax_flash::decode
