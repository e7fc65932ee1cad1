// The scheduler thread of cuda/forward/hopper.cuh; each team of consumer warpgroups (hopper/roles.cuh) has
// one. It fetches the numbers of the team's query tiles, at most one tile ahead of the load warp, and
// computes what the other warps need to know about each tile.
#pragma once

#include <cstdint>

#include "cuda/forward/hopper_state.cuh"
#include "cuda/hopper/tile_scheduler.cuh"
#include "cuda/ptx/dependent.cuh"
#include "cuda/slices.cuh"

namespace jax_flash {

template <class C>
struct SchedulerThread {
  using Shared = typename C::Shared;
  using Tile = typename Shared::Tile;
  using Scheduler = TileScheduler<Over::kQueries, C::kM, C::kCluster, C::kTeams, decltype(Shared::mailbox),
                                  C::kKind == ScoreKind::kRanges || C::kKind == ScoreKind::kListedMask>;
  const Problem& p;
  const PersistentTiles& all;
  const TileSegments& segments;
  Shared& shared;

  // Completes and publishes a tile after begin(): with kEarlyLoad in three parts, each as soon as it is
  // ready, otherwise all at once.
  __device__ __forceinline__ void publish(Tile& tile, uint32_t tile_index) const {
    if constexpr (C::kEarlyLoad) shared.state_pipe.arrive(tile_index);
    if (!tile.done) tile.template prepare<C>(reload(p), segments);
    if constexpr (C::kEarlyLoad) shared.consumer_pipe.arrive(tile_index);
    if (!tile.done) tile.prepare_outputs(reload(p));
    if constexpr (C::kEarlyLoad) {
      shared.epilogue_pipe.arrive(tile_index);
    } else {
      shared.state_pipe.arrive(tile_index);
    }
  }

  __device__ __forceinline__ void run(int team) const {
    uint32_t tile_index = 0;
    Scheduler scheduler{all, shared.mailbox};
    uint32_t number = Scheduler::first(team);
    ptx::wait_for_kernel_before();  // it may make the schedule, or tables of what tiles see
    const uint32_t count = all.count * slice_count<C>(p.value_dim);
    while (number < count) {
      shared.state_pipe.wait_empty(tile_index);
      Tile& tile = shared.tiles[tile_index % kTileStates];
      uint32_t wanted = number;
      if constexpr (C::kHasColumns) wanted = tile.template take<C>(reload(p), number);
      if constexpr (C::kListed) {
        tile.work = scheduler.work(reload(p), wanted, segments.lists.rows, segments.lists.slots);
      } else if constexpr (C::kPacksHeads) {
        tile.work = scheduler.work(reload(p), wanted, C::kM >> p.packing.shift);
        widen_to_heads(reload(p), tile.work.tile);
      } else {
        tile.work = scheduler.work(reload(p), wanted, C::kMulticast * C::kM);
      }
      if (ends_schedule(reload(p), tile.work.tile)) break;
      if (tile.template begin<C>(reload(p), segments)) publish(tile, tile_index++);
      // Waits until the load warp is near the end of the previous tile.
      if (tile_index > 0) shared.ending_pipe.wait_full(tile_index - 1);
      number = scheduler.next(number);
    }
    shared.state_pipe.wait_empty(tile_index);
    Tile& last = shared.tiles[tile_index % kTileStates];
    last.done = 1;
    publish(last, tile_index);
  }
};

}  // namespace jax_flash
