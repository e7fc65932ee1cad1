// The parts of a call's workspace, and their sizes: exact in a plan, else an upper bound.
#pragma once

#include "core/band.h"
#include "core/plan/call.h"
#include "core/plan/dim.h"
#include "core/plan/launch_plan.h"

namespace jax_flash {

struct Workspace {
  int64_t bytes = 0;

  // Returns the offset of the part.
  int64_t add(int64_t part) {
    const int64_t begin = bytes;
    bytes += ceil_div(part, kWorkspaceAlignment) * kWorkspaceAlignment;
    return begin;
  }
};

inline Dim aligned(const Dim& part) {
  return (part + (kWorkspaceAlignment - 1)) / kWorkspaceAlignment * kWorkspaceAlignment;
}

// Upper bound of the tiles of one packed leading entry: those of its sequences and of the tokens outside
// them.
inline Dim varlen_tiles(const Dim& rows, const Dim& sequences, int64_t tile) {
  return rows / tile + sequences + 2;
}

// Bytes of a schedule of `tiles` tiles. The starts of the sequences follow, int32: [n + 3] for the rows that
// are scheduled, with the tokens before and after the sequences, and [n + 1] for the rows of the other side.
inline Dim schedule_bytes(const Dim& leading, const Dim& sequences, const Dim& tiles) {
  return leading * (tiles * int64_t{sizeof(TileWork)} + (sequences + 2) * 8);
}

// Upper bound of a schedule over all kernels; 0 for the fixed layouts. least: rows of the smallest tile.
inline Dim schedule_bound(const AttentionSpec& spec, const DimShapes& s, const Dim& rows,
                          int64_t least = kSmallestTile) {
  if (!spec.packed()) return 0;
  return aligned(schedule_bytes(s.leading, s.batch, varlen_tiles(rows, s.batch, least)));
}

// Slots of a table with an entry for each `block` rows; an upper bound if sizes are not known.
inline Dim block_slots(const AttentionSpec& spec, const Dim& batch, const Dim& rows, int64_t block) {
  return spec.packed() ? rows / block + batch : batch * ((rows + (block - 1)) / block);
}

// Bytes of the table of segments: for each tile of `block` rows, and with `parts` for each kSegmentPart rows,
// the intervals, and whether they and the tile belong to one segment.
inline Dim segments_bytes(const AttentionSpec& spec, const DimShapes& s, const Dim& rows, int64_t block,
                          bool parts) {
  const Dim slots = block_slots(spec, s.batch, rows, block) +
                    (parts ? block_slots(spec, s.batch, rows, kSegmentPart) : Dim(0));
  return s.leading * slots * (intervals_of_slot(spec) * int64_t{sizeof(Interval)} + int64_t{sizeof(int32_t)});
}

// Whether a kernel before the call's own computes the interval that segments, ranges or a boolean mask leave
// to each tile.
inline bool trims_tiles(const AttentionSpec& spec) {
  return spec.has(Operand::kQSegmentIds) || leaves_gaps(spec);
}

// Upper bound over all kernels of the visible intervals that segments and ranges give tiles and parts of
// tiles.
inline Dim segments_bound(const AttentionSpec& spec, const DimShapes& s, const Dim& rows) {
  return trims_tiles(spec) ? aligned(segments_bytes(spec, s, rows, kSmallestTile, true)) : Dim(0);
}

// Bytes of the tables for ranges: the keys that each block of query rows sees, and an entry for each tile of
// `tile` rows of queries or keys.
inline Dim ranges_bytes(const AttentionSpec& spec, const DimShapes& s, const Dim& rows, int64_t tile) {
  static_assert(sizeof(SeenByTile) == 2 * sizeof(Interval));
  return s.leading * (block_slots(spec, s.batch, s.q_rows, kRowBlock) * int64_t{sizeof(SeenByBlock)} +
                      block_slots(spec, s.batch, rows, tile) * int64_t{sizeof(SeenByTile)});
}

// Upper bound of the tables of all kernels for ranges.
inline Dim ranges_bound(const AttentionSpec& spec, const DimShapes& s, const Dim& rows) {
  return spec.has(Operand::kRanges) ? aligned(ranges_bytes(spec, s, rows, kRowBlock)) : Dim(0);
}

// Bytes of the lists of key tiles for 64 query rows of two heads or 128 of one, with block masks or a boolean
// mask. A key tile has at least `keys` keys.
inline Dim key_lists_bytes(const DimShapes& s, int64_t keys) {
  const Dim lists = s.leading * s.batch * s.heads * (s.q_rows / (2 * kRowBlock) + 1);
  return lists * (((s.k_rows + (keys - 1)) / keys) * int64_t{sizeof(KeyPieces)} + int64_t{sizeof(KeyList)});
}

// Bytes of the lists of query tiles of `rows` rows for each `keys` keys, likewise, with the length and the
// span of each list and the order of the key tiles.
inline Dim step_lists_bytes(const DimShapes& s, int64_t rows, int64_t keys) {
  const Dim lists = s.leading * s.batch * ((s.k_rows + (keys - 1)) / keys);
  return lists * (s.heads * ((s.q_rows + (rows - 1)) / rows) + s.kv_heads * 3) * int64_t{sizeof(int32_t)};
}

// Bytes of the tiles of a boolean mask, one for each tile; fewer are used where the mask is broadcast.
inline Dim mask_tiles_bytes(const DimShapes& s) {
  return s.leading * s.batch * s.heads * ((s.q_rows + (kRowBlock - 1)) / kRowBlock) *
         ((s.k_rows + (kRowBlock - 1)) / kRowBlock);
}

// Bytes of the elements of these tiles as bits.
inline Dim mask_words_bytes(const MaskSizes<Dim>& mask) {
  const auto tiles = [](const Dim& size) { return (size + (kRowBlock - 1)) / kRowBlock; };
  return mask.arrays * tiles(mask.rows) * tiles(mask.keys) * (MaskWords::kOfTile * int64_t{sizeof(uint32_t)});
}

inline Dim mask_tiles_bound(const AttentionSpec& spec, const DimShapes& s) {
  return spec.has(Operand::kMask) ? aligned(mask_tiles_bytes(s)) : Dim(0);
}

inline Dim mask_words_bound(const AttentionSpec& spec, const DimShapes& s) {
  return spec.has(Operand::kMask) ? mask_tiles_bound(spec, s) + aligned(mask_words_bytes(s.mask)) : Dim(0);
}

// Upper bounds of the lists of all kernels for block masks and boolean masks.
inline Dim lists_bound(const AttentionSpec& spec, const Dim& lists) {
  return spec.has(Operand::kBlockMask) || spec.has(Operand::kMask) ? aligned(lists) : Dim(0);
}
inline Dim key_lists_bound(const AttentionSpec& spec, const DimShapes& s) {
  return lists_bound(spec, key_lists_bytes(s, kRowBlock));
}
inline Dim step_lists_bound(const AttentionSpec& spec, const DimShapes& s) {
  return lists_bound(spec, step_lists_bytes(s, kRowBlock, kRowBlock));
}

// For how many query tiles a head has sums and tickets of dQ: the tiles of a batch entry, or an upper bound
// of the slots of all packed sequences (first_slot in core/sequence.h). The product of this number and `tile`
// is at most that of a multiple of `tile`, so the largest power of two gives the bound over all smaller ones.
inline Dim dq_tiles(const AttentionSpec& spec, const Dim& rows, const Dim& sequences, int64_t tile) {
  return (rows + (tile - 1)) / tile + (spec.packed() ? sequences : Dim(0));
}

// The batch entries of all leading entries; packed sequences are one.
inline Dim token_entries(const AttentionSpec& spec, const DimShapes& s) {
  return s.leading * (spec.packed() ? Dim(1) : s.batch);
}

inline Dim dq_tiles_of_all_heads(const AttentionSpec& spec, const DimShapes& s, int64_t tile) {
  const Dim heads = token_entries(spec, s) * s.heads;
  return heads * dq_tiles(spec, s.q_rows, s.batch, tile);
}

// The float32 sums of dQ, in tiles of `tile` query rows.
inline Dim dq_sums_bytes(const AttentionSpec& spec, const DimShapes& s, int64_t tile) {
  return dq_tiles_of_all_heads(spec, s, tile) * tile * s.head_dim * 4;
}

// dK and dV of all parts of the query heads, in float32 (LaunchPlan::parts).
inline Dim part_gradients_bytes(const AttentionSpec& spec, const DimShapes& s, int64_t parts) {
  return token_entries(spec, s) * s.k_rows * s.kv_heads * parts * (s.head_dim + s.value_dim) *
         int64_t{sizeof(float)};
}

// The most rows of these, and of the keys of all KV heads whose query heads are divided. An upper bound of
// the bytes, 0 if they are not divided.
inline constexpr int64_t kMostPartRows = 1 << 17, kMostDividedKeys = (1 << 15) - 1;
inline Dim part_gradients_bound(const AttentionSpec& spec, const DimShapes& s) {
  const Dim rows = token_entries(spec, s) * s.k_rows, one = max(s.kv_heads, 1);
  const Dim divides = min((s.heads + -1) / one, 1) * min(kMostDividedKeys / max(rows * one, 1), 1);
  return aligned(divides * min(rows * s.heads, kMostPartRows) * (s.head_dim + s.value_dim) *
                 int64_t{sizeof(float)});
}

// The tickets that order the additions to dQ.
inline Dim dq_tickets_bytes(const AttentionSpec& spec, const DimShapes& s, int64_t tile) {
  return dq_tiles_of_all_heads(spec, s, tile) * 4;
}

inline DimShapes dims_of(const Shapes& s) {
  return {s.as<Dim>(), s.leading, {s.mask.arrays, s.mask.rows, s.mask.keys}};
}

// A grid of tiles over rows of queries or keys, with the schedule that packed sequences need.
TileGrid tile_grid(const Call& call, int64_t rows, int64_t heads, int32_t tile, Workspace& workspace);

// Adds the workspace of ranges' tables for a grid over `rows` rows, whose loops step over tiles of
// `other_block` rows of the other side.
inline void add_ranges(const Call& call, int64_t rows, int32_t other_block, TileGrid& grid,
                       Workspace& workspace) {
  if (grid.blocks == 0) return;
  grid.ranges = workspace.add(ranges_bytes(call.spec, dims_of(call.shapes), rows, grid.block).value());
  grid.other_block = other_block;
}

// Adds the workspace of a boolean mask's tiles.
inline void add_mask_tiles(const Call& call, TileGrid& grid, Workspace& workspace) {
  if (call.spec.has(Operand::kMask) && grid.blocks > 0)
    grid.mask_tiles = workspace.add(mask_tiles_bytes(dims_of(call.shapes)).value());
}

// Adds the workspace of a boolean mask's tiles and of their elements as bits.
inline void add_mask_words(const Call& call, TileGrid& grid, Workspace& workspace) {
  add_mask_tiles(call, grid, workspace);
  if (grid.mask_tiles >= 0)
    grid.mask_words = workspace.add(mask_words_bytes(dims_of(call.shapes).mask).value());
}

// Adds the workspace of the lists of key tiles, of `keys` keys each, for the query tiles of a grid.
inline void add_key_lists(const Call& call, int32_t keys, TileGrid& grid, Workspace& workspace) {
  if (grid.blocks == 0) return;
  add_mask_words(call, grid, workspace);
  grid.lists = workspace.add(key_lists_bytes(dims_of(call.shapes), keys).value());
  grid.other_block = keys;
}

// Adds the workspace of the lists of steps, query tiles of `rows` rows each, for the key tiles of a grid.
inline void add_step_lists(const Call& call, int32_t rows, TileGrid& grid, Workspace& workspace) {
  if (grid.blocks == 0) return;
  add_mask_tiles(call, grid, workspace);
  grid.lists = workspace.add(step_lists_bytes(dims_of(call.shapes), rows, grid.block).value());
  grid.other_block = rows;
}

// The most elements of all parts of dbias, and an upper bound of their bytes.
inline constexpr int64_t kMostPartElements = 1 << 24;
inline Dim dbias_parts_bound(const DimShapes& s) {
  return aligned(min(s.batch * s.heads * s.q_rows * s.k_rows, kMostPartElements) * int64_t{sizeof(float)});
}

// The parts of the batch for `tiles` tiles of a dbias that all batch entries share: the number that divides
// the batch and makes the last CTA end first. Dropout's numbers depend on a batch entry's index.
inline int32_t batch_parts(const KernelRow& row, const Call& call, int64_t tiles) {
  constexpr int64_t kMostParts = 64, kEnds = 3;  // kEnds: the steps that a tile's start, end and sum take
  const Shapes& s = call.shapes;
  if (s.leading_rank > 0 || s.bias[0] > 1 || call.spec.dropout_rate > 0 || tiles == 0) return 1;
  const int64_t elements = s.bias[1] * s.bias[2] * s.bias[3], heads = s.bias[1] > 1 ? 1 : s.heads,
                ctas = std::max<int64_t>(1, int64_t{call.device.sm_count} * row.blocks);
  // Tiles that differ in length occupy all CTAs until the last tile.
  const bool differ = call.tiles_differ();
  const auto time = [&](int64_t parts) {
    const int64_t all = tiles * parts, one = s.batch / parts * heads + kEnds;
    return differ ? (all + ctas) * one / ctas : ceil_div(all, ctas) * one;
  };
  int64_t best = 1;
  for (int64_t parts = 2; parts <= std::min({s.batch, kMostParts, kMostPartElements / elements}); ++parts)
    if (s.batch % parts == 0 && time(parts) < time(best)) best = parts;
  return static_cast<int32_t>(best);
}

// The tiles of dbias, whose CTAs are counted in plan.queries.
inline void plan_bias_tiles(const KernelRow& row, const Call& call, Workspace& workspace, LaunchPlan& plan) {
  const Shapes& s = call.shapes;
  plan.queries.block = row.block_m, plan.queries.tiles = ceil_div(s.bias[2], row.block_m);
  plan.keys.block = row.block_n, plan.keys.tiles = ceil_div(s.bias[3], row.block_n);
  const int64_t tiles = s.leading * s.bias[0] * s.bias[1] * plan.queries.tiles * plan.keys.tiles;
  plan.parts = batch_parts(row, call, tiles);
  plan.queries.blocks = tiles * plan.parts;
  if (plan.parts > 1)
    plan.part_sums = workspace.add(plan.parts * s.bias[1] * s.bias[2] * s.bias[3] * int64_t{sizeof(float)});
}

// Adds the workspace for the visible intervals that segments, ranges and a boolean mask give the tiles of a
// grid over `rows` rows, and parts of tiles if `parts`. A mask does so where the grid has its classified
// tiles.
inline void add_segments(const Call& call, int64_t rows, TileGrid& grid, Workspace& workspace,
                         bool parts = false) {
  if (!trims_tiles(call.spec) || grid.blocks == 0) return;
  grid.segments =
      workspace.add(segments_bytes(call.spec, dims_of(call.shapes), rows, grid.block, parts).value());
  grid.segment_parts = parts;
}

}  // namespace jax_flash
