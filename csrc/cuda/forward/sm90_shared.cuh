// What producers and consumers of cuda/forward/sm90.cuh share, and the producer that finds tiles.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "core/plan.h"
#include "cuda/block_state.cuh"
#include "cuda/epilogue.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/tensor_map.h"
#include "cuda/tile/shared_tile.cuh"

namespace jax_flash {

inline constexpr int kConsumerRows = kHopperRows;  // of wgmma
inline constexpr int kTileStates = 3;  // of queries, in turn: the one in progress, the next, the one after

// The same in all lanes, and known to be.
__device__ __forceinline__ int32_t uniform(int32_t x) { return __shfl_sync(~0u, x, 0); }
__device__ __forceinline__ Interval uniform(Interval x) { return {uniform(x.lo), uniform(x.hi)}; }

// The same problem; nothing that was read of it before, or made of what was read, is kept in registers.
__device__ __forceinline__ const Problem& anew(const Problem& p) {
  const Problem* same = &p;
  asm volatile("" : "+l"(same)::"memory");
  __builtin_assume(same->leading.rank <= 1);  // plan() sees to it
  return *same;
}

// A ring's barriers: a stage is filled, by copies, and left, by every warp that has read it. Uses of
// the ring are counted from 0.
template <int kStages>
struct Ring {
  uint64_t full[kStages], empty[kStages];

  // By how many arrivals it is left, and filled.
  __device__ __forceinline__ void init(uint32_t left, uint32_t filled = 1) {
    for (int i = 0; i < kStages; ++i) {
      ptx::barrier_init(ptx::shared_address(&full[i]), filled);
      ptx::barrier_init(ptx::shared_address(&empty[i]), left);
    }
  }
  __device__ __forceinline__ uint32_t full_of(uint32_t use) const {
    return ptx::shared_address(&full[use % kStages]);
  }
  __device__ __forceinline__ uint32_t empty_of(uint32_t use) const {
    return ptx::shared_address(&empty[use % kStages]);
  }
  __device__ __forceinline__ uint32_t phase(uint32_t use) const { return use / kStages & 1; }
  __device__ __forceinline__ void leave(uint32_t use) const { ptx::barrier_arrive_by_warp(empty_of(use)); }
  // Until the stage's last use is over; at once where there was none.
  __device__ __forceinline__ void wait_empty(uint32_t use) const {
    ptx::barrier_wait(empty_of(use), phase(use) ^ 1);
  }
  // Until what the stage held before has come.
  __device__ __forceinline__ void wait_full_before(uint32_t use) const {
    ptx::barrier_wait(full_of(use), phase(use) ^ 1);
  }
};

// Tiles of keys: those that any row of a consumer sees, and, where lo < hi, those that all its rows see
// whole. end: of the keys that any sees.
struct ConsumerKeys {
  Interval tiles, whole;
  int32_t end;
};

// The tile in progress.
template <class T, int kConsumers>
struct TileState {
  BlockWork work;
  Band band;
  ScoreOperands score;  // of the general kernels
  Interval tiles;       // of keys, that any row of the tile sees
  ConsumerKeys keys[kConsumers];
  GlobalRows<T> out;
  LseRows lse;
  int32_t last_values;  // rows of V's last tile that are the sequence's, where the others are not zero
  int32_t done;         // there is no tile left

  // What the loader needs beside `work`; false: there is nothing to write.
  template <class C>
  __device__ __forceinline__ bool begin(const Problem& p) {
    const TileWork& tile = work.tile;
    if (tile.row >= tile.end) return false;
    band = work.band(p);
    forget();
    tiles = key_tiles<C>(tile.row, tile.used_queries());
    forget();
    if constexpr (C::kCluster > 1) {  // `tiles` are those of all its blocks
      work.tile.row += static_cast<int32_t>(ptx::cluster_rank()) * C::kM;
      work.tile.end = min(work.tile.end, work.tile.row + C::kM);
      forget();
    }
    done = 0;
    return true;
  }

  // What the consumers need beside it.
  template <class C>
  __device__ __forceinline__ void prepare(const Problem& p) {
    const TileWork& tile = work.tile;
#pragma unroll 1
    for (int i = 0; i < kConsumers; ++i) {
      const int32_t first = tile.row + i * kConsumerRows;
      const int32_t last = min(first + kConsumerRows, tile.used_queries());
      const Interval own = key_tiles<C>(first, last);
      keys[i].tiles = own.empty() ? Interval{tiles.lo, tiles.lo} : own;
      forget();
      keys[i].end = band.rows(first, last).hi;
      forget();
      const Interval all = band.common(first, last);
      keys[i].whole = {(all.lo + C::kN - 1) / C::kN, all.hi / C::kN};
    }
    forget();
    last_values = C::kN;
    if (tile.k_begin + tile.k_len < p.k_rows) last_values = min(C::kN, tile.k_len - (tiles.hi - 1) * C::kN);
    forget();
    if constexpr (C::kKind != ScoreKind::kPlain) score.template prepare<C::kKind>(anew(p), work, work.head);
  }

  // What they need in the end.
  __device__ __forceinline__ void prepare_outputs(const Problem& p) {
    out = {p.out.as<T>() + offset(p.out), p.out.row, p.value_dim};
    forget();
    lse.data = p.lse.as<float>() + offset(p.lse);
    forget();
    lse.stride = p.lse.row;
    lse.sink = -INFINITY;
    forget();
    if (p.sinks) lse.sink = p.sinks.as<const float>()[offset(p.sinks)];
  }

  // Leaves it some of its tiles of keys.
  __device__ __forceinline__ void narrow(Interval some) {
    if (some.hi < tiles.hi) last_values = INT32_MAX;
    tiles = some;
#pragma unroll 1
    for (int i = 0; i < kConsumers; ++i) {
      const Interval own = intersect(keys[i].tiles, some);
      keys[i].tiles = own.empty() ? Interval{some.lo, some.lo} : own;
    }
  }

 private:
  // Of the sequence's first row; there is one leading dimension at most.
  __device__ __forceinline__ int64_t offset(const View& view) const {
    return work.leading * view.leading[0] + view.offset(work.batch_row, work.head, work.tile.q_begin);
  }
  // Of keys, that any of the rows [first, last) sees.
  template <class C>
  __device__ __forceinline__ Interval key_tiles(int32_t first, int32_t last) const {
    const Interval seen = band.rows(first, last);
    return seen.empty() ? Interval{0, 0} : Interval{seen.lo / C::kN, (seen.hi - 1) / C::kN + 1};
  }
  // What lies in shared memory is read from there again: one thread of few registers prepares it.
  static __device__ __forceinline__ void forget() { asm volatile("" ::: "memory"); }
};

// Of a cluster: the numbers of tiles that its first block has taken, for the second.
struct Mail {
  static constexpr int kSlots = 3;
  Ring<kSlots> ring;
  uint32_t number[kSlots];

  __device__ __forceinline__ uint32_t slot(uint32_t message) const {
    return ptx::shared_address(&number[message % kSlots]);
  }
};
struct NoMail {};

// The block of a cluster that has the keys, the values, copied to both.
inline constexpr uint32_t kCopiesKeys = 0, kCopiesValues = 1;

// Beside: what else lies there for each tile of keys.
template <class T, class QTile, class KTile, class VTile, int kStages, int kConsumers, class Beside,
          int kCluster>
struct ForwardShared : Beside::Shared {
  alignas(1024) uint8_t q[kConsumers][QTile::kBytes];
  alignas(1024) uint8_t k[kStages][KTile::kBytes];
  alignas(1024) uint8_t v[kStages][VTile::kBytes];
  static constexpr int kTiles = kTileStates;
  using Tile = TileState<T, kConsumers>;
  Tile tiles[kTiles];
  Ring<kTiles> states;             // of them; full: all is there, or, in parts, what the loader needs
  Ring<kTiles> prepared, outputs;  // in parts: what the consumers need, and need in the end
  Ring<1> begun;                   // tiles that the loader has begun
  Ring<1> queries[kConsumers];     // the place of each one's Q
  Ring<kStages> keys, values;
  typename Beside::Barriers beside;
  [[no_unique_address]] std::conditional_t<(kCluster > 1), Mail, NoMail> mail;

  // By how many arrivals of the producers a tile's state is left, and filled.
  __device__ __forceinline__ void init(uint32_t left, uint32_t filled) {
    constexpr uint32_t kConsumer = 4 * ptx::kWarpArrivals;
    states.init(kConsumers * kConsumer + left, filled);
    prepared.init(1);
    outputs.init(1);
    begun.init(1);
    for (auto& ring : queries) ring.init(kConsumer);
    keys.init(kConsumers * kConsumer * kCluster);
    values.init(kConsumers * kConsumer * kCluster);
    beside.init(kConsumers * kConsumer);
    if constexpr (kCluster > 1) mail.ring.init(1);
    ptx::fence_barriers();
  }
};

// The tiles of a grid, and who takes which: those after each taker's first by counter, or, without one, in
// turn.
struct ForwardTiles {
  const TileWork* schedule;
  int32_t tiles;   // of a head
  uint32_t count;  // of all heads
  uint32_t* counter;
  uint32_t heads_together;
};

// As many as have 32 MB of K and V, which stay in L2, but enough for the last tiles to run to be short.
inline uint32_t heads_together(const Problem& p, uint32_t heads) {
  constexpr int64_t kElements = 1 << 24, kFewest = 8;
  const int64_t fit = kElements / std::max<int64_t>(1, int64_t{p.k_rows} * (p.head_dim + p.value_dim));
  return static_cast<uint32_t>(std::max<int64_t>(kFewest, std::min<int64_t>(fit, heads)));
}

// One thread of the producers: finds the work of tiles, at most one tile ahead of its operands.
template <class C>
struct Finder {
  using Tile = typename C::Shared::Tile;
  const Problem& p;
  const ForwardTiles& all;
  typename C::Shared& shared;

  // Clusters, or teams, of all blocks.
  static __device__ __forceinline__ uint32_t takers() { return gridDim.x / C::kCluster * C::kTeams; }

  // After `number`, as late as it may be found: tiles taken early end late, when others have none left. Of a
  // cluster the first block takes the numbers and tells the other.
  __device__ __forceinline__ uint32_t next(uint32_t number, uint32_t round, uint32_t message) const {
    if (round > 0) ptx::barrier_wait(shared.begun.full_of(round - 1), shared.begun.phase(round - 1));
    if constexpr (C::kCluster > 1)
      if (all.counter && ptx::cluster_rank() > 0) return read(message);
    if (!all.counter) return number + takers();
    number = takers() + atomicAdd(all.counter, 1u);
    if constexpr (C::kCluster > 1) tell(message, number);
    return number;
  }
  __device__ __forceinline__ void tell(uint32_t message, uint32_t number) const {
    auto& mail = shared.mail;
    mail.ring.wait_empty(message);
    ptx::store_in(mail.slot(message), number, mail.ring.full_of(message), 1);
  }
  __device__ __forceinline__ uint32_t read(uint32_t message) const {
    auto& mail = shared.mail;
    ptx::barrier_expect(mail.ring.full_of(message), sizeof(uint32_t));
    ptx::barrier_wait(mail.ring.full_of(message), mail.ring.phase(message));
    const uint32_t number = ptx::load_shared(mail.slot(message));
    ptx::barrier_arrive_in(mail.ring.empty_of(message), 0);
    return number;
  }

  // For all at once, or first for a warp that narrows the keys down; or in parts, each as soon as it is
  // there.
  __device__ __forceinline__ void publish(Tile& tile, uint32_t round) const {
    if constexpr (C::kInParts) ptx::barrier_arrive(shared.states.full_of(round));
    if (!tile.done) tile.template prepare<C>(anew(p));
    if constexpr (C::kInParts) ptx::barrier_arrive(shared.prepared.full_of(round));
    if (!tile.done) tile.prepare_outputs(anew(p));
    if constexpr (C::kInParts) {
      ptx::barrier_arrive(shared.outputs.full_of(round));
    } else if constexpr (C::Beside::kNarrows) {
      ptx::barrier_arrive(shared.beside.found.full_of(round));
    } else {
      ptx::barrier_arrive(shared.states.full_of(round));
    }
  }

  __device__ __forceinline__ void run(int team) const {
    uint32_t round = 0, message = 0;
    for (uint32_t number = blockIdx.x / C::kCluster + team * gridDim.x; number < all.count;
         number = next(number, round, message++)) {
      shared.states.wait_empty(round);
      Tile& tile = shared.tiles[round % C::Shared::kTiles];
      tile.work = find_work<Over::kQueries>(anew(p), all.schedule, all.tiles, C::kCluster * C::kM,
                                            {number, all.count}, all.heads_together);
      if (tile.template begin<C>(anew(p))) publish(tile, round++);
    }
    shared.states.wait_empty(round);
    Tile& last = shared.tiles[round % C::Shared::kTiles];
    last.done = 1;
    publish(last, round);
  }
};

}  // namespace jax_flash
