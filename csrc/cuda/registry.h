// The kernels that this build holds, and the launch functions behind them.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <numeric>
#include <span>
#include <type_traits>
#include <utility>

#include "core/band.h"
#include "core/plan/call.h"
#include "core/plan/columns.h"
#include "core/plan/launch_plan.h"
#include "core/problem.h"

namespace jax_flash {

// `tangents`: only used by the tangent pass.
using Launch = cudaError_t(const Problem& p, const Tangents* tangents, const LaunchPlan& plan,
                           void* workspace, cudaStream_t stream);

// Returns cudaErrorNotSupported if another row has to run the call.
using AppendLaunch = cudaError_t(const AppendProblem& p, const Device& device, cudaStream_t stream);

std::span<const KernelRow> built_kernels();
// The launch function of built_kernels()[kernel], a row of any pass but append.
Launch* launch_of(int32_t kernel);
AppendLaunch* append_launch_of(int32_t kernel);

// Calls a pass's launch_row(), with the tangents if it takes them.
template <auto kLaunchRow>
cudaError_t call_launch_row(const Problem& p, const Tangents* tangents, const LaunchPlan& plan,
                            void* workspace, cudaStream_t stream) {
  if constexpr (std::is_invocable_v<decltype(kLaunchRow), const Problem&, const LaunchPlan&, void*,
                                    cudaStream_t>) {
    return kLaunchRow(p, plan, workspace, stream);
  } else {
    return kLaunchRow(p, *tangents, plan, workspace, stream);
  }
}

// Calls launch.operator()<kind>() for the plan's score kind, which is one of the row's.
template <Row kRow, class LaunchKind>
cudaError_t launch_score(ScoreKind kind, LaunchKind launch) {
  cudaError_t status = cudaErrorNotSupported;
  const auto launch_one = [&]<int32_t kIndex>() {
    constexpr auto kKind = static_cast<ScoreKind>(kIndex);
    if constexpr (kRow.takes(kKind)) {
      if (kind == kKind) status = launch.template operator()<kKind>();
    }
  };
  [&]<int32_t... kIndices>(std::integer_sequence<int32_t, kIndices...>) {
    (launch_one.template operator()<kIndices>(), ...);
  }(std::make_integer_sequence<int32_t, kScoreKinds>{});
  return status;
}

// These write the plan's schedules, and the keys that segments, ranges or masks leave visible to each tile,
// to the workspace.
cudaError_t launch_schedules(const Problem& p, const LaunchPlan& plan, void* workspace, cudaStream_t stream);
cudaError_t launch_segments(const Problem& p, const LaunchPlan& plan, void* workspace, cudaStream_t stream);
cudaError_t launch_ranges(const Problem& p, const LaunchPlan& plan, void* workspace, cudaStream_t stream);
cudaError_t launch_blocks(const Problem& p, const LaunchPlan& plan, void* workspace, cudaStream_t stream);
// Finds an order for the key tiles of each group of `together` heads by their lists. `heads`: the number of
// heads of all batch entries.
cudaError_t launch_step_order(const StepLists& lists, int32_t tiles_per_head, uint32_t heads,
                              uint32_t together, cudaStream_t stream);
// Classifies the tiles of a boolean mask as visible in full, in part or not at all, and writes their elements
// as bits if there are `words` for them.
cudaError_t launch_mask_tiles(const Problem& p, const MaskTiles& tiles, const MaskWords& words,
                              cudaStream_t stream);

// The schedule of a grid; null if it has none.
inline const TileWork* schedule_of(const TileGrid& grid, const void* workspace) {
  if (grid.schedule < 0) return nullptr;
  return reinterpret_cast<const TileWork*>(static_cast<const char*>(workspace) + grid.schedule);
}

// The number of slots of a table with one slot for each `block` rows. `rows`: of a batch entry, or of all
// packed sequences.
inline int64_t segment_slots(const Problem& p, int32_t rows, int32_t block) {
  return p.leading.count() * slots_of_entry(p.packed(), rows, p.batch, block);
}

// The intervals that segments and ranges give the tiles of a grid; null without them.
inline const Interval* segments_of(const TileGrid& grid, const void* workspace) {
  if (grid.segments < 0) return nullptr;
  return reinterpret_cast<const Interval*>(static_cast<const char*>(workspace) + grid.segments);
}

// The counter of a persistent grid's tiles, if the plan has one.
inline uint32_t* tile_counter(const LaunchPlan& plan, void* workspace) {
  if (plan.tile_counter < 0) return nullptr;
  return reinterpret_cast<uint32_t*>(static_cast<char*>(workspace) + plan.tile_counter);
}

// The tables by which kernels for ranges skip tiles. The forward takes `tiles`, the backward `rows` and
// `gaps`; they begin at the same address.
struct RangeTables {
  SeenByBlock* blocks = nullptr;              // the keys that each block of query rows sees
  SeenByTile* tiles = nullptr;                // the keys that each query tile sees
  Interval *rows = nullptr, *gaps = nullptr;  // by key tile: rows that see it, and query tiles that do not
};

inline RangeTables range_tables(const Problem& p, const TileGrid& grid, void* workspace) {
  if (grid.ranges < 0) return {};
  const int64_t leading = p.leading.count();
  const int64_t blocks = leading * slots_of_entry(p.packed(), p.q_rows, p.batch, kRowBlock);
  const int64_t key_tiles = leading * slots_of_entry(p.packed(), p.k_rows, p.batch, grid.block);
  auto* first = reinterpret_cast<SeenByBlock*>(static_cast<char*>(workspace) + grid.ranges);
  auto* rows = reinterpret_cast<Interval*>(first + blocks);
  return {first, reinterpret_cast<SeenByTile*>(first + blocks), rows, rows + key_tiles};
}

// The strides of an array with one entry in each dimension that an operand broadcasts, from the last
// dimension on.
struct StoredStrides {
  int64_t size = 1;  // of the dimensions so far

  int64_t add(bool stored, int64_t entries) {
    const int64_t stride = stored ? size : 0;
    if (stored) size *= entries;
    return stride;
  }
};

// The tiles of a boolean mask; none if the plan does not classify its tiles.
inline MaskTiles mask_tiles(const Problem& p, const TileGrid& grid, void* workspace) {
  if (grid.mask_tiles < 0) return {};
  const View& mask = p.mask;
  MaskTiles tiles{static_cast<uint8_t*>(workspace) + grid.mask_tiles};
  tiles.rows = mask.row ? static_cast<int32_t>(ceil_div(p.q_rows, kRowBlock)) : 1;
  tiles.columns = static_cast<int32_t>(ceil_div(p.k_rows, kRowBlock));
  StoredStrides strides{tiles.columns};
  tiles.row = strides.add(mask.row, tiles.rows);
  tiles.head = strides.add(mask.head, p.heads);
  tiles.batch = strides.add(mask.batch, p.batch);
  tiles.leading = strides.add(mask.leads(p.leading), p.leading.count());
  tiles.heads = strides.size / std::max<int64_t>(1, int64_t{tiles.rows} * tiles.columns);
  return tiles;
}

// The elements of a boolean mask as bits; none if the plan's kernel does not read them.
inline MaskWords mask_words(const Problem& p, const TileGrid& grid, void* workspace) {
  if (grid.mask_words < 0) return {};
  const View& mask = p.mask;
  MaskWords to{reinterpret_cast<uint32_t*>(static_cast<char*>(workspace) + grid.mask_words)};
  StoredStrides strides;
  to.column = static_cast<int32_t>(strides.add(mask.column, ceil_div(p.k_rows, kRowBlock)));
  to.row = strides.add(mask.row, ceil_div(p.q_rows, kRowBlock));
  to.head = strides.add(mask.head, p.heads);
  to.batch = strides.add(mask.batch, p.batch);
  to.leading = strides.add(mask.leads(p.leading), p.leading.count());
  return to;
}

// The number of keys in a piece of a key tile. A piece lies in one block, or in one tile of a boolean mask.
inline int32_t keys_of_piece(const Problem& p, int32_t tile_keys) {
  return std::gcd(p.block_mask ? p.spec.block_keys : kRowBlock, tile_keys);
}

// The lists of visible key tiles for the query tiles of a grid.
inline KeyLists key_lists(const Problem& p, const TileGrid& grid, void* workspace) {
  const int32_t group = p.heads / p.kv_heads, of_group = slots_of_group(group, grid.block, grid.consumers),
                slots = p.kv_heads * of_group;
  // The heads share the mask, and the consumers have the same rows in all slots.
  const int32_t parts = grid.block / kRowBlock;
  const bool same = (p.block_mask ? p.block_mask : p.mask).head == 0 && grid.consumers % parts == 0 &&
                    of_group * grid.consumers == group * parts;
  const int32_t listed = same ? std::min(slots, 1) : slots;
  const auto most = static_cast<int32_t>(ceil_div(p.k_rows, grid.other_block));
  const int64_t lists = p.leading.count() * p.batch * listed * grid.tiles;
  auto* tiles = reinterpret_cast<KeyPieces*>(static_cast<char*>(workspace) + grid.lists);
  return {tiles,
          reinterpret_cast<KeyList*>(tiles + lists * most),
          most,
          keys_of_piece(p, grid.other_block),
          grid.block,
          grid.consumers,
          group,
          of_group,
          slots,
          listed,
          static_cast<int32_t>(grid.tiles)};
}

// The lists of visible steps for the key tiles of a grid.
inline StepLists step_lists(const Problem& p, const TileGrid& grid, void* workspace) {
  const auto most = static_cast<int32_t>(p.heads / p.kv_heads * ceil_div(p.q_rows, grid.other_block));
  const int64_t lists = p.leading.count() * p.batch * p.kv_heads * grid.tiles;
  auto* steps = reinterpret_cast<int32_t*>(static_cast<char*>(workspace) + grid.lists);
  return {steps, steps + lists * most, most, steps + lists * (most + 1), steps + lists * (most + 2)};
}

inline TileSegments tile_segments(const Problem& p, const TileGrid& grid, void* workspace) {
  if (grid.ranges >= 0) {
    const RangeTables tables = range_tables(p, grid, workspace);
    return {nullptr, nullptr, nullptr, tables.blocks, tables.tiles};
  }
  if (grid.lists >= 0)
    return {.lists = key_lists(p, grid, workspace), .words = mask_words(p, grid, workspace)};
  const Interval* keys = segments_of(grid, workspace);
  const MaskWords words = mask_words(p, grid, workspace);
  if (!keys) return {.words = words};
  const int64_t all = segment_slots(p, p.q_rows, grid.block);
  const auto* one_segment = reinterpret_cast<const int32_t*>(keys + intervals_of_slot(p.spec) * all);
  const auto* parts = grid.segment_parts ? reinterpret_cast<const Interval*>(one_segment + all) : nullptr;
  return {.keys = keys, .one_segment = one_segment, .part_keys = parts, .words = words};
}

inline GridTiles grid_tiles(const Problem& p, const TileGrid& grid, void* workspace) {
  return {schedule_of(grid, workspace), segments_of(grid, workspace), static_cast<int32_t>(grid.tiles),
          mask_tiles(p, grid, workspace)};
}

// The first row of each of the n packed sequences of queries, and the end of the last one: [n + 1] for each
// leading entry, with a stride of 2 · (n + 2), behind the schedule of the queries.
inline const int32_t* query_starts(const Problem& p, const TileGrid& grid, const void* workspace) {
  return reinterpret_cast<const int32_t*>(schedule_of(grid, workspace) + p.leading.count() * grid.tiles) + 1;
}

}  // namespace jax_flash

// Defines the launch function of a built row. The files that cmake/kernels.cmake writes expand this macro
// once per row and dtype, after including the family's pass, which defines launch_row.
#define JF_DEFINE_LAUNCH(name, dtype, ...)                                                              \
  namespace jax_flash {                                                                                 \
  namespace columns {                                                                                   \
  inline constexpr Row name{__VA_ARGS__};                                                               \
  }                                                                                                     \
  cudaError_t name(const Problem& p, const Tangents* tangents, const LaunchPlan& plan, void* workspace, \
                   cudaStream_t stream) {                                                               \
    return call_launch_row<launch_row<dtype, columns::name>>(p, tangents, plan, workspace, stream);     \
  }                                                                                                     \
  }

// Likewise for a row of append.
#define JF_DEFINE_APPEND_LAUNCH(name, dtype, ...)                                       \
  namespace jax_flash {                                                                 \
  namespace columns {                                                                   \
  inline constexpr Row name{__VA_ARGS__};                                               \
  }                                                                                     \
  cudaError_t name(const AppendProblem& p, const Device& device, cudaStream_t stream) { \
    return append::launch_row<dtype, columns::name>(p, device, stream);                 \
  }                                                                                     \
  }
