// Joins the parts of the sequences that decode has cut, in order.
#pragma once

#include "cuda/decode/results.cuh"
#include "cuda/decode/schedule.cuh"

namespace jax_flash::decode {

// Where a part goes. Given parts: by their number. Else a block leaves two at most: a sequence that it does
// not begin, which then is the first of its range, and one that it begins and does not end, the last.
__device__ __forceinline__ int64_t slot_of(const DecodeGrid& grid, int32_t entry, int32_t unit,
                                           int32_t range) {
  if (grid.fixed_parts()) return int64_t{entry} * grid.slots + unit;
  return 2 * int64_t{range} + (unit == 0 ? 1 : 0);
}

// The parts of a sequence, and their slots.
struct PartList {
  int32_t entry, count;  // 1: it was never cut, 0: it is not decode's
  int32_t range;         // of the first part

  __device__ __forceinline__ int64_t slot(const DecodeGrid& grid, int32_t i) const {
    return slot_of(grid, entry, i, range + i);
  }
};

// Block `index` of a column joins the sequence that block `index` of decode began and did not end, or
// sequence `index` where parts are given.
template <class C>
__device__ __forceinline__ PartList find_parts(const Call& call, const Rows& rows, int32_t index,
                                               typename C::Search::Shared& shared) {
  const DecodeGrid& grid = call.grid;
  if (grid.fixed_parts()) {
    return {index, Tiles<C::kTile>(grid, Entry(call, rows, index)).units, 0};
  }
  const typename C::Search search(call, rows, shared);
  const Partition& partition = search.partition;
  const int32_t begin = partition.begin(index), end = partition.begin(index + 1);
  if (partition.whole || index >= partition.ranges || begin >= end) return {0, 1, index};
  const auto last = search.locate(end - 1);
  const int32_t units = Tiles<C::kTile>(grid, Entry(call, rows, last.entry)).units;
  if (last.base < begin || last.base + units <= end) return {0, 1, index};
  return {last.entry, partition.owner(last.base + units - 1) - index + 1, index};
}

// A warp takes a row, a lane four features of it at a time.
template <class C>
__global__ void __launch_bounds__(C::kThreads)
    combine(const __grid_constant__ Problem p, const __grid_constant__ DecodeGrid grid, void* workspace,
            const int32_t* starts) {
  __shared__ typename C::Search::Shared shared;
  const int32_t column = static_cast<int32_t>(blockIdx.x % grid.columns),
                index = static_cast<int32_t>(blockIdx.x / grid.columns);
  const Call call{p, grid, starts};
  const Rows rows = Rows::of_column<C::kRows>(call, column);
  const PartList list = find_parts<C>(call, rows, index, shared);
  if (list.count <= 1) return;
  const Parts<C::kRows> parts(p, grid, workspace);
  const Entry entry(call, rows, list.entry);
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  for (int32_t row = warp; row < rows.end - rows.first; row += C::kWarps) {
    float m = -INFINITY;
    for (int32_t i = 0; i < list.count; ++i) {
      m = fmaxf(m, parts.softmax[parts.row(list.slot(grid, i), column, row)].m);
    }
    for (int32_t feature = 4 * lane; feature < p.value_dim; feature += 128) {
      float4 o = make_float4(0, 0, 0, 0);
      float l = 0;
#pragma unroll 8
      for (int32_t i = 0; i < list.count; ++i) {
        const int64_t at = parts.row(list.slot(grid, i), column, row);
        const Softmax part = parts.softmax[at];
        const float4 x = *reinterpret_cast<const float4*>(parts.o + at * parts.width + feature);
        const float w = weight(part, m);
        l = fmaf(part.l, w, l);
        o.x = fmaf(x.x, w, o.x), o.y = fmaf(x.y, w, o.y), o.z = fmaf(x.z, w, o.z), o.w = fmaf(x.w, w, o.w);
      }
      RowResult{p, rows, entry, row, feature}.template store<typename C::Element>(o, {m, l});
    }
  }
}

}  // namespace jax_flash::decode
