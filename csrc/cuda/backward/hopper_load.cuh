// The producer warps of cuda/backward/hopper.cuh: they find key tiles, load operands, and order the additions
// to dQ.
#pragma once

#include <cstdint>

#include "cuda/backward/hopper_state.cuh"
#include "cuda/backward/hopper_sums.cuh"
#include "cuda/backward/query_step.cuh"
#include "cuda/gradient.cuh"
#include "cuda/hopper/tile_scheduler.cuh"
#include "cuda/hopper/tma.cuh"
#include "cuda/load/hopper_bias.cuh"

namespace jax_flash {

template <class C>
struct GradientProducer {
  using Config = C;
  using Tile = typename C::Shared::Tile;
  const Problem& p;
  const typename C::Maps& maps;
  typename C::Shared& shared;
  const KeyGrid& grid;
  uint32_t tile_index = 0, step_use = 0;  // key tiles and steps so far

  // Calls visit(tile, step) for the steps of all key tiles, and release() after each tile. `pipe`: says when
  // what `visit` reads of a tile's state is there.
  template <class Pipe, class Visit, class Release>
  __device__ __forceinline__ void for_steps(const Pipe& pipe, Visit visit, Release release) {
    for (;; ++tile_index) {
      pipe.wait_full(tile_index);
      const Tile& tile = shared.tiles[tile_index % kKeyTileStates<C>];
      if (tile.done) return;
      // Read from shared memory each time, because the warps have few registers.
      const auto& walk = tile.walk;
      auto step = first_step(walk, step_use);
      const int32_t end = step.number + walk.steps();
      for (; step.number < end; step.advance(walk)) visit(tile, step);
      step_use = step.number;
      release(tile);
    }
  }

  template <class Visit, class Release>
  __device__ __forceinline__ void for_steps(Visit visit, Release release) {
    for_steps(shared.state_pipe, visit, release);
  }

  // The scheduling thread's: the thread that loads may read the state of the tile, or that no tile is left.
  __device__ __forceinline__ void let_load() const {
    if constexpr (C::kLoadsEarly) shared.walk_pipe.arrive(tile_index);
  }
  __device__ __forceinline__ void end_tiles() const {
    shared.state_pipe.wait_empty(tile_index);
    shared.tiles[tile_index % kKeyTileStates<C>].done = 1;
    let_load();
    shared.state_pipe.arrive(tile_index);
  }

  // With ranges, the longest key tiles of a head may not be the first, in order. A long tile that began late
  // would end last.
  // - Where all rows see the first keys (attention sinks), the first tiles of all heads come before the
  //   others. Elsewhere they would only take longer, as the queries of all heads would pass through L2 once
  //   more.
  // - Where few rows see the first half of the keys (block diffusion), a head begins with the second half.
  __device__ __forceinline__ KeyTileOrder key_tile_order(int32_t tiles_per_head) const {
    if constexpr (C::kKind != ScoreKind::kRanges) return {};
    if (p.packed() || tiles_per_head < 2) return {};
    const int32_t first = grid.segments[0].size(), half = tiles_per_head / 2;
    if (first > 2 * grid.segments[1].size()) return {true, 0};
    return {false, !grid.tickets && grid.segments[half].size() > 2 * first ? half : 0};
  }

  // Whether the key tiles of a tile's head, which add to dQ in order, come from the last to the first.
  __device__ __forceinline__ static bool descends(const PersistentTiles& all, uint32_t number) {
    return kMayOrder<C> && all.descends && number < all.heads.last * all.tiles_per_head;
  }

  // Back and forth: the tiles of one group of KV heads begin together and go from the last query tile to the
  // first that they see, so they end one after the other. The tiles of the next group go the other way, so
  // each begins at the query tile where all tiles of the first group are at that time.
  //
  // Tiles that add to dQ in order go that way, too. Each then begins at a query tile that the tiles before it
  // begin with, or have reached by then. In descending order they go from the first query tile that they see
  // to the last, so each begins before the tile whose sums it waits for.
  __device__ __forceinline__ void set_order(QueryWalk& walk, const PersistentTiles& all,
                                            uint32_t number) const {
    const uint32_t tiles = static_cast<uint32_t>(all.tiles_per_head);
    if (key_tile_order(all.tiles_per_head).leads) number -= min(number, all.count / tiles);
    const uint32_t group = number / (all.heads.size * tiles);
    walk.heads_inner = all.back_and_forth || (C::kCluster > 1 && grid.tickets);
    const bool reversed = grid.tickets ? !descends(all, number) : all.back_and_forth && group % 2 == 0;
    walk.direction = reversed ? -1 : 1;
  }

  // One thread finds the key tiles of the CTA, or of its cluster, at most one ahead.
  template <class Mailbox>
  __device__ __forceinline__ void schedule(const PersistentTiles& all, Mailbox& mailbox) {
    constexpr int32_t kRows = C::kN / C::kCluster;
    using Scheduler = TileScheduler<Over::kKeys, kRows, C::kCluster, 1, Mailbox>;
    Scheduler scheduler{all, mailbox};
    // A tile that waits for its ticket waits for tiles with smaller numbers. These are in progress, because
    // CTAs and clusters take numbers only while they run.
    const bool in_order = grid.tickets;
    uint32_t number = in_order ? scheduler.take() : Scheduler::first(0);
    while (number < all.count) {
      shared.state_pipe.wait_empty(tile_index);
      Tile& tile = shared.tiles[tile_index % kKeyTileStates<C>];
      if constexpr (kListsSteps<C>) {
        tile.work = scheduler.work(reload(p), grid.lists.order[number]);
      } else {
        KeyTileOrder order = key_tile_order(all.tiles_per_head);
        order.descends = descends(all, number);
        tile.work = scheduler.work(reload(p), number, C::kN, 0, order);
        set_order(tile.walk, all, number);
      }
      if (ends_schedule(reload(p), tile.work.tile)) break;
      if (tile.template prepare<C>(reload(p), grid, [this] { let_load(); }))
        shared.state_pipe.arrive(tile_index++);
      if (tile_index > 0) shared.ending_pipe.wait_full(tile_index - 1);
      number = in_order ? scheduler.take() : scheduler.next(number);
    }
    end_tiles();
  }

  // Waits for a stage, and starts the copy of a tile to it.
  template <class TileShape, class Pipe>
  __device__ __forceinline__ void load(const Pipe& pipe, uint32_t use, const uint8_t* to,
                                       const CUtensorMap& map, const ptx::Coordinates& at) const {
    pipe.wait_empty(use);
    ptx::barrier_expect(pipe.full_barrier(use), TileShape::kBytes);
    load_rows<TileShape>(ptx::shared_address(to), 0, map, pipe.full_barrier(use), at);
  }

  // Full when the thread that loads may read a tile's state: in the plain kernel when the walk is known,
  // before the addresses of other operands are.
  __device__ __forceinline__ const auto& loading_pipe() const {
    if constexpr (C::kLoadsEarly) {
      return shared.walk_pipe;
    } else {
      return shared.state_pipe;
    }
  }

  // One thread loads Q and dO of the first step, K and V, then Q and dO of the other steps.
  __device__ __forceinline__ void load_tiles() {
    if constexpr (C::kLoadsEarly)
      for (const auto* map : {&maps.query, &maps.dout, &maps.key, &maps.value}) ptx::prefetch_map(*map);
    for_steps(
        loading_pipe(),
        [&](const Tile& tile, const QueryStep& step) {
          const BlockWork& work = tile.work;
          const uint32_t use = step.number, stage = use % C::kStages;
          const int32_t head = work.head + step.head, row = work.tile.q_begin + step.tile * C::kM;
          load<typename C::QTile>(shared.q_pipe, use, shared.q[stage], maps.query,
                                  coordinates_of(p.query, work, head, row));
          load<typename C::DoTile>(shared.do_pipe, use, shared.d_out[stage], maps.dout,
                                   coordinates_of(p.dout, work, head, row));
          if (use == step_use) load_keys(tile);
          if constexpr (C::kWaitsForEnd) {
            if (ends_soon(tile, step)) shared.ending_pipe.arrive(tile_index);
          }
        },
        [&](const Tile& tile) {
          if (tile.walk.tiles.empty()) skip_keys();
          shared.state_pipe.release_by_thread(tile_index);
        });
  }

  // Whether the next tile may be taken after this step of the tile. If a CTA takes a tile earlier, while it
  // has a long one in progress, that tile starts late: it ends when no other CTA has work left, and its
  // queries are no longer in L2.
  __device__ __forceinline__ bool ends_soon(const Tile& tile, const QueryStep& step) const {
    constexpr int32_t kSoon = 4;  // steps; they take as long as finding a tile
    return step.number - static_cast<int32_t>(step_use) == max(tile.walk.steps() - kSoon, 0);
  }

  __device__ __forceinline__ void load_keys(const Tile& tile) const {
    const int32_t key = tile.work.tile.k_begin + tile.work.tile.row;
    const ptx::Coordinates of_k = coordinates_of(p.key, tile.work, tile.kv_head, key),
                           of_v = coordinates_of(p.value, tile.work, tile.kv_head, key);
    const uint8_t *const k = shared.keys(tile_index), *const v = shared.values(tile_index);
    if constexpr (C::kValuesApart) {
      load<typename C::KTile>(shared.key_pipe, tile_index, k, maps.key, of_k);
      load<typename C::VTile>(shared.value_pipe, tile_index, v, maps.value, of_v);
      return;
    }
    const uint32_t full = shared.key_pipe.full_barrier(tile_index);
    shared.key_pipe.wait_empty(tile_index);
    ptx::barrier_expect(full, C::KTile::kBytes + C::VTile::kBytes);
    load_rows<typename C::KTile>(ptx::shared_address(k), 0, maps.key, full, of_k);
    load_rows<typename C::VTile>(ptx::shared_address(v), 0, maps.value, full, of_v);
  }

  __device__ __forceinline__ void skip_keys() const {
    if constexpr (C::kWaitsForEnd) shared.ending_pipe.arrive(tile_index);
    shared.key_pipe.wait_empty(tile_index);
    shared.key_pipe.arrive(tile_index);
    if constexpr (!C::kValuesApart) return;
    shared.value_pipe.wait_empty(tile_index);
    shared.value_pipe.arrive(tile_index);
  }

  // Calls clear(is_clean) if a step's Q and dO have rows that are not in use, which may hold NaN. With the
  // plain score these are the rows outside `clean`. Other scores may hide all keys of a row; with them these
  // are the rows whose P is 0, and `some` says whether there are any.
  template <class Clear>
  __device__ __forceinline__ void if_unclean(const Tile& tile, const QueryStep& step, bool some,
                                             Clear clear) const {
    if constexpr (C::kKind == ScoreKind::kPlain) {
      reload_shared();  // read here from shared memory, because there are few registers
      const Interval clean{tile.clean.lo - step.tile * C::kM, tile.clean.hi - step.tile * C::kM};
      if (clean.lo > 0 || clean.hi < C::kM) clear([=](int i) { return clean.contains(i); });
    } else if (some) {
      const float* const lse = shared.statistics[step.number % C::kStages].lse;
      __syncwarp();  // every lane has stored its own lse
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

  // The segments of a step's rows, for kernels that compare them.
  __device__ __forceinline__ SegmentRange row_segments(const Tile& tile, const QueryStep& step) const {
    if constexpr (kStagesSegments<C>) {
      const int32_t row = step.tile * C::kM;
      // Tests p, because the pointer is never set in a call without segments.
      if (p.q_segment_ids && row < tile.band.q_len)
        return SegmentRange::of<C::kM>(tile.score.q_segments + row, tile.band.q_len - row);
    }
    return {};
  }

  // For kernels that mark steps: one bit per consumer of `Consumers`, whose first key is key_of(i), set if
  // some row of the step does not see all of the consumer's keys. With ranges, each lane tests one block of
  // rows for one consumer.
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
    } else if constexpr (kListsSteps<C>) {
#pragma unroll
      for (int i = 0; i < kParts; ++i) {
        const int32_t part = (key_of(i) - tile.work.tile.row) / kConsumerRows;
        bits |= (KeyPieces::seen(step.listed, part) != SeenPiece::kAll ? 1u : 0u) << i;
      }
    }
    return bits;
  }

  // One warp loads lse and delta. Rows that see no key get an lse that makes their P = 0. Without a cluster
  // the warp also waits for Q and dO, so that consumers wait for one barrier only.
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
            const float delta = row_delta(x.x, x.y),
                        kept = C::kOmitsDropoutScale ? 1 - p.spec.dropout_rate : 1;
            shared.statistics[stage].delta[i] = C::kStartsFromDelta ? -delta : delta * kept;
            large_lse |= lse_too_large(row_lse(x.x));
            unseen |= x.x == -INFINITY;
          };
          // Issues as many loads as registers allow before it waits for the stage.
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
          if constexpr (C::kM > 96) {
            const float2 third = fetch(lane + 64), fourth = fetch(lane + 96);
            store(lane + 64, third);
            store(lane + 96, fourth);
          } else if constexpr (C::kM > 64) {
            store(lane + 64, fetch(lane + 64));
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

  // One warp loads bias and mask of a step, for the keys from `key` on.
  __device__ __forceinline__ void load_score_tile(const Tile& tile, const QueryStep& step,
                                                  int32_t key) const {
    if constexpr (C::kBiasByTma) return load_bias(tile, step, key);
    if (!p.bias && !p.mask) return;
    const ScoreOperands operands = tile.score.template of_head<typename C::Score>(p, tile.work, step.head);
    shared.score_pipe.wait_empty(step.number);
    C::Tiles::load(shared, p, operands, tile.band, step.tile * C::kM, key, step.number);
  }

  // The same for a bias by TMA. Every lane arrives, as it does after cp.async.
  __device__ __forceinline__ void load_bias(const Tile& tile, const QueryStep& step, int32_t key) const {
    using BiasTile = typename C::Tiles::BiasTile;
    const uint32_t full = shared.score_pipe.full_barrier(step.number);
    shared.score_pipe.wait_empty(step.number);
    if (threadIdx.x % 32 != 0) return ptx::barrier_arrive(full);
    ptx::Coordinates at = bias_coordinates_of(p, tile.work, tile.work.head + step.head, step.tile * C::kM);
    at.column = key;
    ptx::barrier_expect(full, bias_bytes<BiasTile>(p));
    load_rows<BiasTile>(C::Tiles::stage_of(shared, step.number), 0, maps.bias, full, at);
  }

  // One warp loads bias and mask of every step.
  __device__ __forceinline__ void load_score_tiles() {
    for_steps(
        [&](const Tile& tile, const QueryStep& step) { load_score_tile(tile, step, tile.work.tile.row); },
        [&](const Tile&) { shared.state_pipe.release(tile_index); });
  }
};

}  // namespace jax_flash
