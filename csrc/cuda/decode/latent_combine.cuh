// Merges the parts of the entries of a latent pool that several CTAs have attended to, in a kernel of its
// own: the rows of an entry, up to 64 of 512 columns, are too many for the CTA that ends last, which would
// take 17 us.
#pragma once

#include <cstdint>

#include "cuda/decode/combine.cuh"
#include "cuda/decode/latent_call.cuh"
#include "cuda/launch.h"
#include "cuda/ptx/dependent.cuh"

namespace jax_flash::decode::inline JF_ARCH_NAMESPACE {

// An entry and the number of its parts. There is one for each entry if the splits are fixed, otherwise for
// each range, with the entry that begins in it and ends in a later one; without such an entry, parts is 0.
struct SplitEntry {
  int32_t entry, parts;
};
static_assert(sizeof(SplitEntry) == sizeof(unsigned long long));

template <int kRows>
__device__ __forceinline__ SplitEntry* split_entry(const PartialResults<kRows>& partial, int32_t item,
                                                   int32_t column) {
  return reinterpret_cast<SplitEntry*>(partial.counter({0, 0, item}, column));
}

// Says that no entry begins in a CTA's range and ends in a later one, until note_split() says otherwise.
template <int kRows>
__device__ __forceinline__ void clear_split(const LatentCall& call, int32_t range, int32_t column) {
  if (call.grid.memory >= 0 && !call.grid.fixed_parts())
    *split_entry(PartialResults<kRows>(call), range, column) = {0, 0};
}
// The CTA of an entry's first part says so.
template <int kRows>
__device__ __forceinline__ void note_split(const LatentCall& call, const Parts& parts, int32_t entry,
                                           int32_t column) {
  if (call.grid.memory < 0 || parts.own != 0) return;
  const bool fixed = call.grid.fixed_parts();
  if (fixed || parts.count > 1)
    *split_entry(PartialResults<kRows>(call), fixed ? entry : parts.first, column) = {entry, parts.count};
}

// CTA (x, y) merges some rows of an entry: a warp has 128 columns of a row.
inline constexpr int kMergedRows = 4, kMergedColumns = 512, kMergeWarps = kMergedRows * kMergedColumns / 128;

template <class T, int kRows>
__global__ void __launch_bounds__(kMergeWarps * 32) combine_latent(const __grid_constant__ LatentCall call) {
  constexpr int kAtOnce = 8;  // parts that are loaded together
  ptx::wait_for_kernel_before();
  const int32_t item = call.columns.quotient(static_cast<int32_t>(blockIdx.x));
  const LatentColumn<kRows, false> column{call, static_cast<int32_t>(blockIdx.x) - item * call.columns.value};
  const int32_t warp = static_cast<int32_t>(threadIdx.x / 32);
  const int32_t row = static_cast<int32_t>(blockIdx.y) * kMergedRows + warp / (kMergedColumns / 128),
                feature = warp % (kMergedColumns / 128) * 128;
  if (feature >= call.value_dim) return;
  if (call.grid.fixed_parts() && !column.sequence(call, item).served()) return;  // there is no such entry
  const PartialResults<kRows> partial(call);
  const SplitEntry split = *split_entry(partial, item, column.kv_head);
  if (split.parts <= 1) return;
  const ColumnRows rows = column.rows(column.entry(split.entry));
  const SequenceWork work = column.sequence(call, split.entry);
  if (row >= rows.count() || !is_written(call, rows, work, row)) return;
  combine_row<T, kAtOnce>(call, rows, work, partial, {split.parts, 0, item}, column.kv_head, row, feature);
}

// Launches the kernel after the one that has stored the parts, if any entry may be split.
template <class T, int kRows>
cudaError_t launch_combine(const LatentCall& call, cudaStream_t stream) {
  static_assert(kRows % kMergedRows == 0);
  if (call.grid.memory < 0) return cudaSuccess;
  const int64_t items = call.grid.fixed_parts() ? call.sequences : call.grid.ranges;
  void (*const kernel)(LatentCall) = combine_latent<T, kRows>;
  return launch_early(can_wait(reinterpret_cast<const void*>(kernel)), kernel, 1,
                      {items * call.columns.value, kRows / kMergedRows}, kMergeWarps * 32, 0, stream, call);
}

}  // namespace jax_flash::decode::inline JF_ARCH_NAMESPACE
