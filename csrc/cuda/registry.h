// The kernels that this build holds, and the launch functions behind them.
#pragma once

#include <cuda_runtime_api.h>

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

// `tangents`: filled for the tangent pass alone.
using Launch = cudaError_t(const Problem& p, const Tangents* tangents, const LaunchPlan& plan,
                           void* workspace, cudaStream_t stream);

// cudaErrorNotSupported: another row has to run the call.
using AppendLaunch = cudaError_t(const AppendProblem& p, const Device& device, cudaStream_t stream);

std::span<const KernelRow> built_kernels();
Launch* launch_of(int32_t kernel);  // an index into built_kernels(), of a row of any pass but append
AppendLaunch* append_launch_of(int32_t kernel);

// A pass's launch_row, which takes the tangents only where they are its operands.
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

// Calls launch.operator()<kind>() with the plan's score variant, which is one of the row's.
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

// Writes a plan's schedules, and what segments, ranges or block masks leave to each tile, to the workspace.
cudaError_t launch_schedules(const Problem& p, const LaunchPlan& plan, void* workspace, cudaStream_t stream);
cudaError_t launch_segments(const Problem& p, const LaunchPlan& plan, void* workspace, cudaStream_t stream);
cudaError_t launch_ranges(const Problem& p, const LaunchPlan& plan, void* workspace, cudaStream_t stream);
cudaError_t launch_blocks(const Problem& p, const LaunchPlan& plan, void* workspace, cudaStream_t stream);

// The schedule of a grid; null if it has none.
inline const TileWork* schedule_of(const TileGrid& grid, const void* workspace) {
  if (grid.schedule < 0) return nullptr;
  return reinterpret_cast<const TileWork*>(static_cast<const char*>(workspace) + grid.schedule);
}

// The intervals that segments give the tiles of a grid; null without segments.
inline const Interval* segments_of(const TileGrid& grid, const void* workspace) {
  if (grid.segments < 0) return nullptr;
  return reinterpret_cast<const Interval*>(static_cast<const char*>(workspace) + grid.segments);
}

// What kernels for ranges skip tiles by: the blocks of query rows, and either query tiles or, of key tiles,
// the query rows from the first to the last that sees one, and a gap of query tiles between them.
struct RangeTables {
  SeenByBlock* blocks = nullptr;
  SeenByTile* tiles = nullptr;
  Interval *rows = nullptr, *gaps = nullptr;
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

// The lists that block masks leave to the query tiles of a grid, of which each has two consumers.
inline KeyLists key_lists(const Problem& p, const TileGrid& grid, void* workspace) {
  const int32_t heads = 2 * kRowBlock / grid.block;
  const auto most = static_cast<int32_t>(ceil_div(p.k_rows, grid.other_block));
  const int64_t lists = p.leading.count() * p.batch * (p.heads / heads) * grid.tiles;
  auto* tiles = reinterpret_cast<KeyPieces*>(static_cast<char*>(workspace) + grid.lists);
  return {tiles,
          reinterpret_cast<KeyList*>(tiles + lists * most),
          most,
          std::gcd(p.spec.block_keys, grid.other_block),
          grid.block,
          heads,
          static_cast<int32_t>(grid.tiles)};
}

// The lists of steps that block masks leave to the key tiles of a grid.
inline StepLists step_lists(const Problem& p, const TileGrid& grid, void* workspace) {
  const auto most = static_cast<int32_t>(p.heads / p.kv_heads * ceil_div(p.q_rows, grid.other_block));
  const int64_t lists = p.leading.count() * p.batch * p.kv_heads * grid.tiles;
  auto* steps = reinterpret_cast<int32_t*>(static_cast<char*>(workspace) + grid.lists);
  return {steps, steps + lists * most, most};
}

inline TileSegments tile_segments(const Problem& p, const TileGrid& grid, void* workspace) {
  if (grid.ranges >= 0) {
    const RangeTables tables = range_tables(p, grid, workspace);
    return {nullptr, nullptr, nullptr, tables.blocks, tables.tiles};
  }
  if (grid.lists >= 0) return {nullptr, nullptr, nullptr, nullptr, nullptr, key_lists(p, grid, workspace)};
  const Interval* keys = segments_of(grid, workspace);
  if (!keys) return {};
  const int64_t all = p.leading.count() * p.batch * grid.tiles;
  const auto* one_segment = reinterpret_cast<const int32_t*>(keys + all);
  if (!grid.segment_parts) return {keys, one_segment, nullptr};
  return {keys, one_segment, reinterpret_cast<const Interval*>(one_segment + all)};
}

inline GridTiles grid_tiles(const TileGrid& grid, const void* workspace) {
  return {schedule_of(grid, workspace), segments_of(grid, workspace), static_cast<int32_t>(grid.tiles)};
}

// The starts of packed sequences of queries: [n + 1] for each leading entry, 2 · (n + 2) apart, after the
// schedule of the queries.
inline const int32_t* query_starts(const Problem& p, const TileGrid& grid, const void* workspace) {
  return reinterpret_cast<const int32_t*>(schedule_of(grid, workspace) + p.leading.count() * grid.tiles) + 1;
}

}  // namespace jax_flash

// The launch function of a built row: the files that cmake/kernels.cmake writes use it once per row and
// dtype, after including the family's pass, which defines launch_row.
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

// The same for a row of append.
#define JF_DEFINE_APPEND_LAUNCH(name, dtype, ...)                                       \
  namespace jax_flash {                                                                 \
  namespace columns {                                                                   \
  inline constexpr Row name{__VA_ARGS__};                                               \
  }                                                                                     \
  cudaError_t name(const AppendProblem& p, const Device& device, cudaStream_t stream) { \
    return append::launch_row<dtype, columns::name>(p, device, stream);                 \
  }                                                                                     \
  }
