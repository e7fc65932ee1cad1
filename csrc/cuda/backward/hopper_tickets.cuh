// Deterministic calls: the order in which key tiles add to dQ.
#pragma once

#include <cstdint>

#include "cuda/backward/hopper_state.cuh"
#include "cuda/backward/hopper_sums.cuh"
#include "cuda/backward/query_step.cuh"
#include "cuda/ptx/atomic.cuh"
#include "cuda/work.cuh"

namespace jax_flash {

// In a deterministic call, the number of key tiles that add to dQ of a query tile of `rows` rows before this
// one: all key tiles before it, from the first that the rows see, or in descending order all after it. If
// segments, ranges or a mask leave each key tile an interval of queries, all lanes of the warp count the
// intervals that contain the query tile outside of their gaps.
template <class C, class Tile>
__device__ __forceinline__ int32_t tiles_before(const KeyGrid& grid, const Problem& p, const Tile& tile,
                                                int32_t query_tile, int32_t rows = C::kM) {
  const BlockWork& work = tile.work;
  const int32_t row = query_tile * rows, own = work.tile.row / C::kN;
  const Interval keys = tile.band.rows(row, row + rows);
  if (tile.walk.direction > 0) return (keys.hi - 1) / C::kN - own;
  const int32_t first = keys.lo / C::kN;
  if constexpr (kTrimsSteps<C>) {
    if (grid.segments) {
      int64_t slot = (work.leading * p.batch + work.batch_row) * grid.key_tiles;
      if constexpr (kTakesGaps<typename C::Score>) slot = slot_of_tile<Over::kKeys>(p, work, C::kN) - own;
      const auto rows_of = [&](int32_t n) {
        if constexpr (C::kKind != ScoreKind::kRanges && kTakesGaps<typename C::Score>)
          return seen_of_slot(p, grid.segments, slot + n).any;
        return grid.segments[slot + n];
      };
      const auto skips = [&](int32_t n) {
        if constexpr (C::kKind != ScoreKind::kRanges) return false;
        const Interval gap = grid.gaps[slot + n];
        return gap.lo * C::kM <= row && row + rows <= gap.hi * C::kM;
      };
      int32_t before = 0;
      for (int32_t n = first; n < own; n += 32) {
        const int32_t other = n + static_cast<int32_t>(threadIdx.x % 32);
        const bool adds =
            other < own && !intersect(rows_of(other), {row, row + rows}).empty() && !skips(other);
        before += __popc(__ballot_sync(~0u, adds));
      }
      return before;
    }
  }
  return own - first;
}

// A ticket covers 2^ticket_shift query tiles of a head, because each ticket costs a wait for memory and a
// fence. Its counter is that of its first query tile.
__device__ __forceinline__ int32_t ticket_of(const KeyGrid& grid, const QueryStep& step) {
  return step.tile >> grid.ticket_shift;
}
// The counter of a step's ticket, at a head of the group.
template <class Tile>
__device__ __forceinline__ uint32_t* count_of(const KeyGrid& grid, const Tile& tile, const QueryStep& step,
                                              int32_t head) {
  return tile.tickets + head * grid.sums.tiles + (ticket_of(grid, step) << grid.ticket_shift);
}
// The number of key tiles that add to a step's ticket before this one.
template <class C, class Tile>
__device__ __forceinline__ int32_t tiles_before_ticket(const KeyGrid& grid, const Problem& p,
                                                       const Tile& tile, const QueryStep& step) {
  return tiles_before<C>(grid, p, tile, ticket_of(grid, step), C::kM << grid.ticket_shift);
}

// Whether a whole warp finds the tickets, as tiles_before() needs it.
template <class C>
inline constexpr bool kWarpOrders = kTrimsSteps<C>;

// One thread of a producer, where sums are ordered: lets consumers add dQ of a ticket when the key tiles with
// earlier tickets have, and raises the ticket's counter when they have added it. Meanwhile it watches for the
// next ticket of the key tile, so that consumers seldom wait. If a whole warp runs this, its first thread
// does.
template <class Producer>
__device__ __forceinline__ void order_sums(Producer& of) {
  using C = typename Producer::Config;
  auto& shared = of.shared;
  const KeyGrid& grid = of.grid;
  const bool leads = !kWarpOrders<C> || threadIdx.x % 32 == 0;
  for (;; ++of.tile_index) {
    shared.state_pipe.wait_full(of.tile_index);
    const auto& tile = shared.tiles[of.tile_index % kKeyTileStates<C>];
    if (tile.done) return;
    const auto& walk = tile.walk;
    const auto before = [&](const QueryStep& step) { return tiles_before_ticket<C>(grid, of.p, tile, step); };
    const auto count = [&](const QueryStep& step) { return count_of(grid, tile, step, step.head); };
    // For the first step of a ticket: the number of the step after its last one.
    const auto end_of_ticket = [&](const QueryStep& step) {
      const int32_t first = ticket_of(grid, step) << grid.ticket_shift;
      const Interval ticket = intersect({first, first + (1 << grid.ticket_shift)}, walk.tiles);
      return step.number + walk.tiles_left(ticket, step.tile);
    };
    const auto let_add = [&](const QueryStep& step, int32_t end) {  // the steps [step, end)
#pragma unroll 1
      for (int32_t use = step.number; use < end; ++use) shared.sum_pipe.arrive(use);
    };
    auto next = first_step(walk, of.step_use);  // the first step of a ticket
    const int32_t end = next.number + walk.steps();
    int32_t wanted = next.number < end ? before(next) : 0;
    bool allowed = false;
#pragma unroll 1
    while (next.number < end) {
      const int32_t stop = end_of_ticket(next);
      uint32_t* const own = count(next);
      if (leads && !allowed) {
        ptx::wait_at_least(own, wanted);
        let_add(next, stop);
      }
      while (next.number < stop) next.advance(walk);
      wanted = next.number < end ? before(next) : 0;
      allowed = false;
      if (!leads) continue;
      while (!allowed && next.number < end && !shared.sum_pipe.is_released(stop - 1)) {
        allowed = ptx::is_at_least(count(next), wanted);
        if (allowed) let_add(next, end_of_ticket(next));
      }
      shared.sum_pipe.wait_released(stop - 1);
      ptx::raise_by_thread(own);
    }
    of.step_use = end;
    if constexpr (kWarpOrders<C>) __syncwarp();
    if (leads) shared.state_pipe.release_by_thread(of.tile_index);
  }
}

// Adds dQ when it is this key tile's turn. `sum`: see index_of_sum().
template <class Consumer>
__device__ __forceinline__ void add_dq_in_order(Consumer& of, uint32_t use, int32_t sum) {
  of.shared.sum_pipe.wait_full(use);
  add_dq<true>(of, sum);
  of.shared.sum_pipe.release(use);
}

// Adds dQ after the key tiles with earlier tickets, every warp of which has then raised the counter.
template <class Consumer>
__device__ __forceinline__ void add_dq_by_ticket(Consumer& of, int32_t sum) {
  using C = typename Consumer::Config;
  constexpr uint32_t kWarps = C::kConsumers * kConsumerWarps;
  const int32_t index = index_of_sum(sum);
  uint32_t* const ticket = of.tile().tickets + index;
  const int32_t before = tiles_before<C>(of.grid, of.p, of.tile(), index % of.grid.sums.tiles);
  ptx::wait_at_least(ticket, before * kWarps);
  add_dq<true>(of, sum);
  ptx::raise_by_warp(ticket);
}

}  // namespace jax_flash
