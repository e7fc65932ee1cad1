// Deterministic calls: the order in which key tiles add to dQ.
#pragma once

#include <cstdint>

#include "cuda/backward/hopper_state.cuh"
#include "cuda/backward/hopper_sums.cuh"
#include "cuda/ptx/atomic.cuh"
#include "cuda/work.cuh"

namespace jax_flash {

// In a deterministic call, the number of key tiles that add to dQ of a query tile of `rows` rows before this
// one: all key tiles before it, from the first that the rows see. If segments or ranges leave each key tile
// an interval of queries, all lanes of the warp count the intervals that contain the query tile outside of
// their gaps.
template <class C, class Tile>
__device__ __forceinline__ int32_t tiles_before(const KeyGrid& grid, const Problem& p, const Tile& tile,
                                                int32_t query_tile, int32_t rows = C::kM) {
  const BlockWork& work = tile.work;
  const int32_t row = query_tile * rows, own = work.tile.row / C::kN,
                first = tile.band.rows(row, row + rows).lo / C::kN;
  if constexpr (kTrimsSteps<C>) {
    if (grid.segments) {
      int64_t slot = (work.leading * p.batch + work.batch_row) * grid.key_tiles;
      if constexpr (C::Score::reads(Operand::kRanges)) slot = slot_of_tile<Over::kKeys>(p, work, C::kN) - own;
      const auto rows_of = [&](int32_t n) {
        if constexpr (C::kKind != ScoreKind::kRanges && C::Score::reads(Operand::kRanges))
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

// Adds dQ when it is this key tile's turn.
template <class Consumer>
__device__ __forceinline__ void add_dq_in_order(Consumer& of, uint32_t use, int32_t sum) {
  of.shared.sum_pipe.wait_full(use);
  add_dq(of, sum);
  of.shared.sum_pipe.release(use);
}

// Adds dQ after the key tiles with earlier tickets, every warp of which has then raised the counter.
template <class Consumer>
__device__ __forceinline__ void add_dq_by_ticket(Consumer& of, int32_t sum) {
  using C = typename Consumer::Config;
  constexpr uint32_t kWarps = C::kConsumers * kConsumerWarps;
  uint32_t* const ticket = of.tile().tickets + sum;
  const int32_t before = tiles_before<C>(of.grid, of.p, of.tile(), sum % of.grid.sums.tiles);
  ptx::wait_at_least(ticket, before * kWarps);
  add_dq(of, sum);
  ptx::raise_by_warp(ticket);
}

}  // namespace jax_flash
