// Host side of split-KV decode, for all families: how sequences are split, the memory of partial results, and
// that of the lists of key tiles that masks leave.
#pragma once

#include <algorithm>

#include "core/plan/family.h"
#include "core/split.h"
#include "core/visible/listed_tiles.h"

namespace jax_flash {

// Bytes of partial results: O, m and l of each row, and a counter. There are fewer counters than rows.
inline Dim partial_bytes(const Dim& rows, const Dim& value_dim) {
  constexpr int64_t kSoftmax = 8, kCounter = 8;
  return rows * (value_dim * 4 + (kSoftmax + kCounter));
}

inline bool has_decode_lists(const AttentionSpec& spec) {
  return spec.has(Operand::kBlockMask) || spec.has(Operand::kMask);
}

// Whether decode reads all operands of a call. The rows and keys of a boolean mask count from the call's own
// first ones, which `position` does not change. An element of a list has room for as many tiles.
inline bool decode_reads(const Call& call, const KernelRow& row) {
  const AttentionSpec& spec = call.spec;
  if (spec.operands & ~kOfDecode || (spec.has(Operand::kMask) && spec.has(Operand::kPosition))) return false;
  return !has_decode_lists(spec) || ceil_div(call.shapes.k_rows, row.block_n) <= kMostListedTiles;
}

// Bytes of the lists of tiles of `tile` keys that block masks and boolean masks leave to `columns` columns of
// `entries` sequences, or chunks of sequences (cuda/decode_lists.cu); 0 for calls without such a mask.
inline Dim decode_lists_bytes(const AttentionSpec& spec, const Dim& entries, const Dim& columns,
                              const Dim& keys, int64_t tile) {
  constexpr int64_t kWords = 3;  // beside the tiles
  if (!has_decode_lists(spec)) return 0;
  return entries * columns * ((max(keys, 1) + (tile - 1)) / tile + kWords) * int64_t{sizeof(int32_t)};
}

// Plans the splits of `entries` sequences, or chunks of sequences; the grid has columns and ranges already.
// split_keys: keys of a split in batch-invariant mode.
inline void plan_parts(const KernelRow& row, const Call& call, int64_t entries, int64_t split_keys,
                       Workspace& workspace, DecodeGrid& grid) {
  const int64_t tiles = ceil_div(std::max<int64_t>(call.shapes.k_rows, 1), row.block_n);
  const int64_t lists =
      decode_lists_bytes(call.spec, entries, grid.columns, call.shapes.k_rows, row.block_n).value();
  if (lists > 0) grid.lists = workspace.add(lists);
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
