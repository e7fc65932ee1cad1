// Host side of split-KV decode, for all families: how sequences are split, and the memory of partial results.
#pragma once

#include <algorithm>

#include "core/plan/family.h"
#include "core/split.h"

namespace jax_flash {

// Bytes of partial results: O, m and l of each row, and a counter. There are fewer counters than rows.
inline Dim partial_bytes(const Dim& rows, const Dim& value_dim) {
  constexpr int64_t kSoftmax = 8, kCounter = 8;
  return rows * (value_dim * 4 + (kSoftmax + kCounter));
}

// Plans the splits of `entries` sequences, or chunks of sequences; the grid has columns and ranges already.
// split_keys: keys of a split in batch-invariant mode.
inline void plan_parts(const KernelRow& row, const Call& call, int64_t entries, int64_t split_keys,
                       Workspace& workspace, DecodeGrid& grid) {
  const int64_t tiles = ceil_div(std::max<int64_t>(call.shapes.k_rows, 1), row.block_n);
  if (call.spec.num_splits > 0) {
    grid.parts = std::min(call.spec.num_splits, kMaxSplits);
    grid.slots = static_cast<int32_t>(std::min<int64_t>(grid.parts, tiles));
  } else if (call.spec.batch_invariant) {
    grid.part_tiles = static_cast<int32_t>(split_keys / row.block_n);
    grid.slots = static_cast<int32_t>(ceil_div(tiles, grid.part_tiles));
  }
  grid.all_slots = grid.fixed_parts() ? entries * grid.slots : 2 * int64_t{grid.ranges};
  const bool splits = grid.fixed_parts() ? grid.slots > 1 : grid.ranges > 1;
  if (splits) {
    const int64_t rows = grid.all_slots * grid.columns * row.block_m;
    grid.memory = workspace.add(partial_bytes(rows, call.shapes.value_dim).value());
  }
}

}  // namespace jax_flash
