// The producer warps of cuda/backward/hopper.cuh: key tiles are found, operands come in, sums of dQ go out.
#pragma once

#include <cstdint>

#include "cuda/backward/hopper_state.cuh"
#include "cuda/backward/query_step.cuh"
#include "cuda/gradient.cuh"
#include "cuda/hopper/tile_scheduler.cuh"
#include "cuda/hopper/tma.cuh"

namespace jax_flash {

template <class C>
struct GradientProducer {
  using Tile = typename C::Shared::Tile;
  const Problem& p;
  const typename C::Maps& maps;
  typename C::Shared& shared;
  const KeyGrid& grid;
  uint32_t tile_index = 0, step_use = 0;  // key tiles and steps so far

  // Calls visit(tile, step) for the steps of all key tiles, and release() after each tile.
  template <class Visit, class Release>
  __device__ __forceinline__ void for_steps(Visit visit, Release release) {
    for (;; ++tile_index) {
      shared.state_pipe.wait_full(tile_index);
      const Tile& tile = shared.tiles[tile_index % kKeyTileStates];
      if (tile.done) return;
      const auto& walk = tile.walk;  // in shared memory, as the warps have few registers
      auto step = first_step(walk, step_use);
      const int32_t end = step.number + walk.steps();
      for (; step.number < end; step.advance(walk)) visit(tile, step);
      step_use = step.number;
      release(tile);
    }
  }

  // Back and forth: of one group of KV heads the tiles, which begin together, go from the last query tile to
  // the first that they see. So they end one after the other, and those of the next group, which go the other
  // way, begin where all of that group's tiles are at that time.
  //
  // Tiles that add to dQ in order go from the last query tile to the first, too: each begins with one that
  // the tiles before it begin with as well, or come to by then.
  __device__ __forceinline__ void set_order(QueryWalk& walk, const PersistentTiles& all,
                                            uint32_t number) const {
    const uint32_t group = number / (all.heads_together * static_cast<uint32_t>(all.tiles_per_head));
    walk.heads_inner = all.back_and_forth || (C::kCluster > 1 && grid.tickets);
    walk.direction = grid.tickets || (all.back_and_forth && group % 2 == 0) ? -1 : 1;
  }

  // One thread: finds the key tiles of the CTA, or of its cluster, at most one ahead.
  template <class Mailbox>
  __device__ __forceinline__ void schedule(const PersistentTiles& all, Mailbox& mailbox) {
    using Scheduler = TileScheduler<Over::kKeys, C::kN / C::kCluster, C::kCluster, 1, Mailbox>;
    Scheduler scheduler{all, mailbox};
    // A tile that waits for its ticket waits for tiles of smaller numbers. These run, as every number is
    // taken by a CTA, or a cluster, that runs.
    const bool in_order = grid.tickets;
    uint32_t number = in_order ? scheduler.take() : Scheduler::first(0);
    while (number < all.count) {
      shared.state_pipe.wait_empty(tile_index);
      Tile& tile = shared.tiles[tile_index % kKeyTileStates];
      tile.work = scheduler.work(reload(p), number);
      set_order(tile.walk, all, number);
      if (tile.template prepare<C>(reload(p), grid, maps)) shared.state_pipe.arrive(tile_index++);
      if (tile_index > 0) shared.ending_pipe.wait_full(tile_index - 1);
      number = in_order ? scheduler.take() : scheduler.next(number);
    }
    shared.state_pipe.wait_empty(tile_index);
    shared.tiles[tile_index % kKeyTileStates].done = 1;
    shared.state_pipe.arrive(tile_index);
  }

  // Waits for a stage, and starts the copy of a tile to it.
  template <class TileShape, class Pipe>
  __device__ __forceinline__ void load(const Pipe& pipe, uint32_t use, const uint8_t* to,
                                       const CUtensorMap& map, const ptx::Coordinates& at) const {
    pipe.wait_empty(use);
    ptx::barrier_expect(pipe.full_barrier(use), TileShape::kBytes);
    load_rows<TileShape>(ptx::shared_address(to), 0, map, pipe.full_barrier(use), at);
  }

  // One thread: Q and dO of the first step, K and V, then Q and dO of the others.
  __device__ __forceinline__ void load_tiles() {
    for_steps(
        [&](const Tile& tile, const QueryStep& step) {
          const BlockWork& work = tile.work;
          const uint32_t use = step.number, stage = use % C::kStages;
          const int32_t head = work.head + step.head, row = work.tile.q_begin + step.tile * C::kM;
          load<typename C::QTile>(shared.q_pipe, use, shared.q[stage], maps.query,
                                  coordinates_of(p.query, work, head, row));
          load<typename C::DoTile>(shared.do_pipe, use, shared.d_out[stage], maps.dout,
                                   coordinates_of(p.dout, work, head, row));
          if (use == step_use) load_keys(tile);
          if (ends_soon(tile, step)) shared.ending_pipe.arrive(tile_index);
        },
        [&](const Tile& tile) {
          if (tile.walk.tiles.empty()) skip_keys();
          shared.state_pipe.release_by_thread(tile_index);
        });
  }

  // Whether this step of the tile is the one after which the next tile may be taken. A tile that is taken
  // earlier by a CTA with a long one in progress starts late: it ends when others have none left, and its
  // queries are no longer in L2.
  __device__ __forceinline__ bool ends_soon(const Tile& tile, const QueryStep& step) const {
    constexpr int32_t kSoon = 4;  // steps, which cover the time that finding a tile takes
    return step.number - static_cast<int32_t>(step_use) == max(tile.walk.steps() - kSoon, 0);
  }

  __device__ __forceinline__ void load_keys(const Tile& tile) const {
    const int32_t key = tile.work.tile.k_begin + tile.work.tile.row;
    const uint32_t full = shared.key_pipe.full_barrier(tile_index);
    shared.key_pipe.wait_empty(tile_index);
    ptx::barrier_expect(full, C::KTile::kBytes + C::VTile::kBytes);
    load_rows<typename C::KTile>(ptx::shared_address(shared.k), 0, maps.key, full,
                                 coordinates_of(p.key, tile.work, tile.kv_head, key));
    load_rows<typename C::VTile>(ptx::shared_address(shared.v), 0, maps.value, full,
                                 coordinates_of(p.value, tile.work, tile.kv_head, key));
  }

  __device__ __forceinline__ void skip_keys() const {
    shared.ending_pipe.arrive(tile_index);
    shared.key_pipe.wait_empty(tile_index);
    shared.key_pipe.arrive(tile_index);
  }

  // Calls clear(is_clean) if rows of a step's Q and dO are not in use and may hold NaN: of the plain score
  // those outside `clean`, of others, which may hide all keys of a row, those whose P is 0. `some`: whether
  // there are any of these.
  template <class Clear>
  __device__ __forceinline__ void if_unclean(const Tile& tile, const QueryStep& step, bool some,
                                             Clear clear) const {
    if constexpr (C::kKind == ScoreKind::kPlain) {
      reload_shared();  // found where it is needed, as registers are few
      const Interval clean{tile.clean.lo - step.tile * C::kM, tile.clean.hi - step.tile * C::kM};
      if (clean.lo > 0 || clean.hi < C::kM) clear([=](int i) { return clean.contains(i); });
    } else if (some) {
      const float* const lse = shared.statistics[step.number % C::kStages].lse;
      __syncwarp();  // every lane has stored its own
      clear([=](int i) { return lse[i] != INFINITY; });
    }
  }

  // Q ← 0 and dO ← 0 in rows that are not in use.
  __device__ __forceinline__ void clear_queries(const Tile& tile, const QueryStep& step, bool some) const {
    if_unclean(tile, step, some, [&](auto is_clean) { clear_rows_unless(step, is_clean); });
  }

  template <class IsClean>
  __device__ __forceinline__ void clear_rows_unless(const QueryStep& step, IsClean is_clean) const {
    const uint32_t use = step.number, stage = use % C::kStages;
    const int lane = static_cast<int>(threadIdx.x % 32);
    shared.q_pipe.wait_full(use);
    clear_rows<typename C::QTile>(shared.q[stage], is_clean, lane, 32);
    shared.do_pipe.wait_full(use);
    clear_rows<typename C::DoTile>(shared.d_out[stage], is_clean, lane, 32);
    ptx::fence_async_shared();
  }

  // The segments of a step's rows, where the kernel compares them.
  __device__ __forceinline__ SegmentRange row_segments(const Tile& tile, const QueryStep& step) const {
    if constexpr (kStagesSegments<C>) {
      const int32_t row = step.tile * C::kM;
      // Not the pointer: that of a call without segments is never set.
      if (p.q_segment_ids && row < tile.band.q_len)
        return SegmentRange::of<C::kM>(tile.score.q_segments + row, tile.band.q_len - row);
    }
    return {};
  }

  // Where steps are marked: for each consumer of `Consumers`, whose first key is key_of(i), a bit, whether
  // some row of the step does not see all its keys. Of ranges one lane tests a block of rows for a consumer.
  template <int kParts, class Step, class KeyOf>
  __device__ __forceinline__ uint32_t partial_consumers(const Tile& tile, const Step& step,
                                                        KeyOf key_of) const {
    uint32_t bits = 0;
    if constexpr (C::kKind == ScoreKind::kRanges) {
      constexpr int kBlocks = C::kM / kRowBlock;
      const int32_t lane = static_cast<int32_t>(threadIdx.x % 32);
      const int32_t row = step.tile * C::kM + lane / kParts * kRowBlock;
      bool partial = false;
      if (lane < kParts * kBlocks && row < tile.band.q_len) {
        const SeenByBlock& block = tile.score.blocks[row / kRowBlock];
        const Interval first = block.whole[0], last = block.whole[1];
        const int32_t key = key_of(lane % kParts), end = key + kConsumerRows;
        partial = !(first.lo <= key && end <= first.hi) && !(last.lo <= key && end <= last.hi);
      }
      bits = __ballot_sync(~0u, partial);
      if constexpr (kBlocks > 1) bits |= bits >> kParts;
      bits &= (1u << kParts) - 1;
    } else if constexpr (C::kKind == ScoreKind::kBlocks) {
#pragma unroll
      for (int i = 0; i < kParts; ++i) {
        const int32_t part = (key_of(i) - tile.work.tile.row) / kConsumerRows;
        bits |= (KeyPieces::seen(step.listed, part) != SeenPiece::kAll ? 1u : 0u) << i;
      }
    }
    return bits;
  }

  // One warp: lse and delta. Rows that see no key get an lse that makes their P = 0. Without
  // a cluster it waits for Q and dO, too, so that consumers have one barrier to wait for.
  __device__ __forceinline__ void load_statistics() {
    const int lane = static_cast<int>(threadIdx.x % 32);
    for_steps(
        [&](const Tile& tile, const auto& step) {
          const uint32_t use = step.number, stage = use % C::kStages;
          const Interval seen = tile.seen;
          const float* const lse = tile.lse + step.head * p.lse.head;
          const float* const delta = tile.delta + step.head * p.delta.head;
          bool large_lse = false, unseen = false;
          const auto fetch = [&](int i) {
            const int32_t row = step.tile * C::kM + i;
            const bool used = seen.contains(row);
            return float2{used ? lse[row * p.lse.row] : -INFINITY, used ? delta[row * p.delta.row] : 0};
          };
          const auto store = [&](int i, float2 x) {
            shared.statistics[stage].lse[i] = row_lse(x.x);
            const float delta = row_delta(x.x, x.y);
            shared.statistics[stage].delta[i] = C::kStartsFromDelta ? -delta : delta;
            large_lse |= lse_too_large(row_lse(x.x));
            unseen |= x.x == -INFINITY;
          };
          // Loads are issued before the stage is empty, as many as registers allow.
          const float2 first = fetch(lane), second = fetch(lane + 32);
          const SegmentRange segments = row_segments(tile, step);
          const uint32_t partial = partial_consumers<C::kConsumers>(
              tile, step, [&](int32_t i) { return tile.work.tile.row + i * kConsumerRows; });
          shared.ready_pipe.wait_empty(use);
          if constexpr (kStagesSegments<C>) {
            if (lane == 0) shared.segments.rows[stage] = segments;
          }
          store(lane, first);
          store(lane + 32, second);
          if constexpr (C::kM > 64) {
            const float2 third = fetch(lane + 64), fourth = fetch(lane + 96);
            store(lane + 64, third);
            store(lane + 96, fourth);
          }
          large_lse = __any_sync(~0u, large_lse);
          if (lane == 0) shared.large_lse[stage] = large_lse | partial << 1, shared.step_ring.put(step);
          clear_queries(tile, step, __any_sync(~0u, unseen));
          if constexpr (C::kCluster == 1) {
            shared.q_pipe.wait_full(use);
            shared.do_pipe.wait_full(use);
          }
          ptx::barrier_arrive_by_warp(shared.ready_pipe.full_barrier(use));
        },
        [&](const Tile&) { shared.state_pipe.release(tile_index); });
  }

  // Issues accumulator += dQ, a consumer's part of a step's.
  __device__ __forceinline__ void start_dq_sum(const Tile& tile, const QueryStep& step, int consumer) const {
    const SumPart part = sum_part<C>(p.head_dim, consumer);
    float* const sum = tile.sums + int64_t{step.head * tile.sum_tiles + step.tile} * (C::kM * p.head_dim);
    shared.dq_pipe[consumer].wait_full(step.number);
    if (part.columns > 0)
      ptx::reduce_add_floats(sum + part.first, ptx::shared_address(shared.dq[consumer]),
                             part.columns * kSumColumn * sizeof(float));
    ptx::bulk_commit();
  }

  // A ticket of a deterministic call covers 2^ticket_shift query tiles of a head, since each takes a wait for
  // memory and a fence. Its count lies in the place of the first of them.
  __device__ __forceinline__ int32_t ticket_of(const QueryStep& step) const {
    return step.tile >> grid.ticket_shift;
  }
  __device__ __forceinline__ uint32_t* count_of(const Tile& tile, const QueryStep& step) const {
    return tile.tickets + step.head * grid.query_tiles + (ticket_of(step) << grid.ticket_shift);
  }
  // Whether a step is the first, the last of its ticket: the walk goes backwards.
  __device__ __forceinline__ bool begins_ticket(const Tile& tile, const QueryStep& step) const {
    return ticket_of(step) != (step.tile + 1) >> grid.ticket_shift || step.tile == tile.walk.tiles.hi - 1;
  }
  __device__ __forceinline__ bool ends_ticket(const Tile& tile, const QueryStep& step) const {
    return ticket_of(step) != (step.tile - 1) >> grid.ticket_shift || step.tile == tile.walk.tiles.lo;
  }

  // Adds a step's dQ to the accumulator, at the beginning of a ticket after the `before` key tiles whose
  // tickets are earlier.
  __device__ __forceinline__ void add_step(const Tile& tile, const QueryStep& step, bool begins,
                                           int32_t before) const {
    if (begins) ptx::wait_count(count_of(tile, step), before);
    start_dq_sum(tile, step, 0);
    start_dq_sum(tile, step, 1);
    ptx::bulk_wait_read<1>();
    shared.dq_pipe[0].release_by_thread(step.number);
    ptx::bulk_wait_read<0>();
    shared.dq_pipe[1].release_by_thread(step.number);
    if (ends_ticket(tile, step)) {
      ptx::bulk_wait<0>();
      ptx::raise_count(count_of(tile, step));
    }
  }

  // One thread, where sums are ordered: adds dQ to the accumulator. With segments it is the warp's first, and
  // the others help to find its ticket.
  static constexpr bool kWarpAddsDq = kTrimsSteps<C>;
  __device__ __forceinline__ void add_dq() {
    const bool leads = !kWarpAddsDq || threadIdx.x % 32 == 0;
    for_steps(
        [&](const Tile& tile, const QueryStep& step) {
          const bool begins = begins_ticket(tile, step);
          const int32_t before =
              begins ? tiles_before<C>(grid, p, tile, ticket_of(step), C::kM << grid.ticket_shift) : 0;
          if (leads) add_step(tile, step, begins, before);
        },
        [&](const Tile&) {
          if constexpr (kWarpAddsDq) __syncwarp();
          if (leads) shared.state_pipe.release_by_thread(tile_index);
        });
  }

  // One warp: bias and mask of a step, for the keys from `key` on.
  __device__ __forceinline__ void load_score_tile(const Tile& tile, const QueryStep& step,
                                                  int32_t key) const {
    if (!p.bias && !p.mask) return;
    const ScoreOperands operands = tile.score.template of_head<typename C::Score>(p, tile.work, step.head);
    shared.score_pipe.wait_empty(step.number);
    C::Tiles::load(shared, p, operands, tile.band, step.tile * C::kM, key, step.number);
  }

  // One warp: those of every step.
  __device__ __forceinline__ void load_score_tiles() {
    for_steps(
        [&](const Tile& tile, const QueryStep& step) { load_score_tile(tile, step, tile.work.tile.row); },
        [&](const Tile&) { shared.state_pipe.release(tile_index); });
  }
};

}  // namespace jax_flash
