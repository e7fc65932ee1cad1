// The portable decode, for few query rows against many keys: Flash-Decoding (Dao et al., 2023). It is bound
// by memory bandwidth, so each key and value is read once and the copies never stop.
//
// A thread block works on one KV head, whose query heads share its products. Each of its warps has a ring of
// its own (ring.cuh), and the warps synchronise only where a sequence, or the block's part of it, ends.
#pragma once

#include "core/families/portable_layout.h"
#include "cuda/decode/combine.cuh"
#include "cuda/decode/partition.cuh"
#include "cuda/decode/results.cuh"
#include "cuda/decode/ring.cuh"
#include "cuda/decode/warp_attention.cuh"
#include "cuda/decode/warp_merge.cuh"
#include "cuda/launch.h"
#include "cuda/ptx/shared.cuh"
#include "cuda/registry.h"

namespace jax_flash {
namespace decode::inline JF_ARCH_NAMESPACE {

// A row of csrc/kernels.def: M query rows of a KV head, and N keys per tile of the whole block. Stored: T, or
// uint8_t for float8, whose rings have twice as many stages in the same memory.
template <class T, class Stored, RowColumns R>
struct DecodeSm80 {
  using Element = T;
  static constexpr int kHeadDim = R.head_dim, kValueDim = R.value_dim, kRows = R.block_m, kTile = R.block_n;
  static constexpr int kWarps = R.warps, kThreads = kWarps * 32, kBlocks = R.blocks;
  using Ring = WarpRing<Stored, kHeadDim, kValueDim, R.stages * (sizeof(T) / sizeof(Stored)), kTile>;
  using WarpState = WarpAttention<T, Stored, kHeadDim, kValueDim, kRows / 8>;
  using Search = Partitioner<kTile, kThreads>;
  static constexpr RowShape kShape{kHeadDim, kValueDim, kRows, kTile, R.stages, kWarps, true};
  static constexpr DecodeLayout kLayout = decode_layout(kShape, sizeof(T));
  static constexpr int kMergeColumns = decode_merge_columns(kShape), kMergePitch = decode_merge_pitch(kShape);
  static constexpr int kSharedBytes = kLayout.bytes;
  static_assert(kLayout.warp_ring == Ring::kBytes && sizeof(Softmax) == 2 * sizeof(float));
  static_assert(sizeof(typename Search::Shared) <= kBlockStateBytes);
  static_assert(kTile == kWarps * Ring::kKeys && kRows % 8 == 0 && kValueDim % kMergeColumns == 0);
};

// float8 is copied and multiplied 64 features at a time.
template <class T, int HeadDim, int ValueDim, int...>
inline constexpr bool supports_float8 = sizeof(T) == 2 && HeadDim % 64 == 0 && ValueDim % 64 == 0;

// This warp's share of the keys of one segment.
template <class C>
__device__ __forceinline__ void attend_segment(const Problem& p, const ColumnRows& rows,
                                               const SequenceWork& work, WorkIterator<C::kTile>& segment,
                                               typename C::Ring& ring, typename C::WarpState& state) {
  constexpr int kKeys = C::Ring::kKeys;
  state.begin(p, rows, work);
  for (; segment.tile < segment.tile_end; ++segment.tile) {
    const uint32_t k = ring.wait();
    const int32_t key = segment.tile * C::kTile + static_cast<int>(threadIdx.x) / 32 * kKeys;
    if (key < work.keys.hi && key + kKeys > work.keys.lo) {
      state.step(p, rows, work, key, k, k + C::Ring::KTile::kBytes);
    }
    ring.release();
  }
}

// Sets the number of splits to 0 in the OutputRows that this block is responsible for: those of its range, or
// those of all sequences where the call fixes the splits.
template <class C>
__device__ __forceinline__ void clear_outputs(const Call& call, const ColumnRows& rows, int32_t column,
                                              int32_t range, void* workspace) {
  if (call.grid.memory < 0 || (call.grid.fixed_parts() && range > 0)) return;
  const PartialResults<C::kRows> partial(call.p, call.grid, workspace);
  const int32_t first = call.grid.fixed_parts() ? 0 : range;
  const int32_t last =
      call.grid.fixed_parts() ? static_cast<int32_t>(call.p.leading.count() * call.p.batch) : range + 1;
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < (last - first) * C::kRows; i += C::kThreads) {
    const int32_t index = first + i / C::kRows;
    const int32_t row = i % C::kRows;
    if (call.grid.fixed_parts()) {
      const SequenceWork work(call, rows, index);
      const bool written = SequenceUnits<C::kTile>(call.grid, work).units > 1 && row < rows.count() &&
                           OutputRow::exists(call.p, rows, work, row);
      if (written) continue;  // by the block that has the sequence's first split
    }
    partial.outputs[partial.row(index, column, row)] = OutputRow{};
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocks)
    decode_sm80(const __grid_constant__ Problem p, const __grid_constant__ DecodeGrid grid, void* workspace,
                const int32_t* starts) {
  using T = typename C::Element;
  __shared__ typename C::Search::Shared found;
  uint8_t* const shared = ptx::dynamic_shared();
  const int32_t column = static_cast<int32_t>(blockIdx.x % grid.columns),
                range = static_cast<int32_t>(blockIdx.x / grid.columns);
  const Call call{p, grid, starts};
  const ColumnRows rows = ColumnRows::of_column<C::kRows>(call, column);
  const typename C::Search search(call, rows, found);
  const Partition& partition = search.partition;
  clear_outputs<C>(call, rows, column, range, workspace);
  const int32_t begin = partition.begin(range), end = partition.begin(range + 1);
  if (range >= partition.ranges || begin >= end) return;
  const auto first = search.locate(begin);

  WorkIterator<C::kTile> segment{begin, end, first.index, first.base};
  const uint32_t rings = ptx::shared_address(shared);
  typename C::Ring ring(rings + threadIdx.x / 32 * C::kLayout.warp_ring, call, rows, segment);
  WarpMerge<C> merge(shared);
  typename C::WarpState state;
  for (; !segment.done(); segment.advance()) {
    const SequenceWork work = segment.open(call, rows);
    attend_segment<C>(p, rows, work, segment, ring, state);
    merge.run(state, rows.count(), [&](int32_t row, int32_t feature, float4 o, Softmax softmax) {
      if (feature >= p.value_dim || !OutputRow::exists(p, rows, work, row)) return;
      if (segment.covers_sequence())
        return OutputRow(p, rows, work, row, 0).template store<T>(p, feature, o, softmax);
      const PartialResults<C::kRows> partial(p, grid, workspace);
      const int64_t at =
          partial.row(partial_slot(grid, segment.index, segment.unit - segment.base, range), column, row);
      *reinterpret_cast<float4*>(partial.o + at * partial.width + feature) = o;
      if (feature > 0) return;
      partial.softmax[at] = softmax;
      if (!segment.begins_sequence()) return;
      const int32_t index = grid.fixed_parts() ? segment.index : range;
      const int32_t splits =
          grid.fixed_parts() ? segment.all : partition.owner(segment.base + segment.all - 1) - range + 1;
      partial.outputs[partial.row(index, column, row)] = OutputRow(p, rows, work, row, splits);
    });
  }
}

template <class C>
cudaError_t launch(const Problem& p, const LaunchPlan& plan, void* workspace, cudaStream_t stream) {
  const DecodeGrid& grid = plan.decode;
  const int32_t* starts = p.packed() ? query_starts(p, plan.queries, workspace) : nullptr;
  const int64_t blocks = int64_t{grid.columns} * grid.ranges;
  const cudaError_t e = jax_flash::launch(decode_sm80<C>, blocks, C::kThreads, C::kSharedBytes, stream, p,
                                          grid, workspace, starts);
  if (e != cudaSuccess || grid.memory < 0) return e;
  if (const cudaError_t preferred = prefer_shared_memory(combine<C>); preferred != cudaSuccess)
    return preferred;
  const int64_t merged = grid.fixed_parts() ? p.leading.count() * p.batch : grid.ranges;
  return jax_flash::launch(combine<C>, merged * grid.columns, C::kThreads, 0, stream, p, grid, workspace);
}

}  // namespace decode::inline JF_ARCH_NAMESPACE

inline namespace JF_ARCH_NAMESPACE {

template <class T, RowColumns R>
cudaError_t launch_row(const Problem& p, const LaunchPlan& plan, void* workspace, cudaStream_t stream) {
  const auto run = [&]<class Stored>() {
    return decode::launch<decode::DecodeSm80<T, Stored, R>>(p, plan, workspace, stream);
  };
  if (!is_float8(p.kv_dtype)) return run.template operator()<T>();
  if constexpr (decode::supports_float8<T, R.head_dim, R.value_dim>) {
    return run.template operator()<uint8_t>();
  } else {
    return cudaErrorInvalidValue;  // plan() never chooses this row for float8
  }
}

}  // namespace JF_ARCH_NAMESPACE
}  // namespace jax_flash
