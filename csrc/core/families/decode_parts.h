// How decode's sequences are split, and the memory of their parts' results, on the host: for the families'
// decode kernels.
#pragma once

#include <algorithm>

#include "core/plan/family.h"
#include "core/split.h"

namespace jax_flash {

// O, the softmax and a counter of so many rows: m and l; there are fewer counters than rows.
inline Dim partial_bytes(const Dim& rows, const Dim& value_dim) {
  constexpr int64_t kSoftmax = 8, kCounter = 8;
  return rows * (value_dim * 4 + (kSoftmax + kCounter));
}

// Plans the parts of `entries` sequences, or what takes their place, whose grid has columns and ranges.
// split_keys: of a split in batch-invariant mode.
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

inline constexpr int64_t kMostShares = 1024;  // CTAs, where they split sequences

// CTAs of a column: one wave of them, or a few where one wave would leave SMs idle.
inline int32_t ranges_of_column(int64_t columns, int64_t wave) {
  const auto efficiency = [&](int64_t ranges) {
    const int64_t blocks = columns * ranges;
    return static_cast<double>(blocks) / static_cast<double>(ceil_div(blocks, wave) * wave);
  };
  constexpr double kGain = 1.05;  // that is worth more CTAs
  int64_t best = std::max<int64_t>(1, wave / columns);
  for (int64_t ranges = best + 1; ranges * columns <= kMostShares && ranges <= 4 * wave / columns; ++ranges) {
    if (efficiency(ranges) > efficiency(best) * kGain) best = ranges;
  }
  return static_cast<int32_t>(best);
}

// Plans the equal shares of a grid that has its columns.
inline void plan_shares(const KernelRow& row, const Call& call, int64_t split_keys, Workspace& workspace,
                        DecodeGrid& grid) {
  const int64_t tiles = ceil_div(std::max<int64_t>(call.shapes.k_rows, 1), row.block_n);
  const int64_t wave = std::min<int64_t>(int64_t{call.device.sm_count} * row.blocks, kMostShares);
  grid.ranges =
      static_cast<int32_t>(std::min<int64_t>(ranges_of_column(grid.columns, wave), call.entries() * tiles));
  plan_parts(row, call, call.entries(), split_keys, workspace, grid);
}

}  // namespace jax_flash
