// The persistent tile scheduler of the sm_90a kernels, which gives the tiles of a grid to CTAs.
//
// A worker is a CTA, a team of a CTA, or a cluster. Its first tile is its own index. The next tiles come from
// a counter in global memory or, if all tiles are equally long, with a fixed stride. In a cluster the first
// CTA takes the number and sends it to the second CTA.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>

#include "core/plan/launch_plan.h"
#include "cuda/hopper/pipeline.cuh"
#include "cuda/hopper/roles.cuh"
#include "cuda/registry.h"
#include "cuda/work.cuh"

namespace jax_flash {

// Tiles whose state a worker keeps in shared memory: one each that is scheduled, loaded and consumed.
inline constexpr int kTileStates = 3;

// The tiles of a grid.
struct PersistentTiles {
  const TileWork* schedule;  // of packed sequences, else null
  int32_t tiles_per_head;
  uint32_t count;     // tiles of all heads
  uint32_t* counter;  // counts the tiles that were taken; nullptr: workers have a fixed stride
  HeadGroups heads;
  bool back_and_forth = false;  // in the backward, every other group of heads has its steps in reverse
  bool descends = false;        // in the backward, all groups but the last begin with their last key tiles
};

// The number of heads whose tiles run together: those whose K and V take 32 MB, so that they stay in L2, but
// at least 8, so that the last tiles are short.
inline uint32_t heads_together(const Problem& p, uint32_t heads) {
  constexpr int64_t kElements = 1 << 24, kFewest = 8;
  const int64_t all = int64_t{heads} * p.k_rows * (p.head_dim + p.value_dim);
  const int64_t groups =
      std::max<int64_t>(1, (all + kElements / 2) / kElements);  // groups of equal size, so that none is small
  return static_cast<uint32_t>(std::max<int64_t>(kFewest, (heads + groups - 1) / groups));
}

// The tile numbers that the first CTA of a cluster sends to the second.
struct TileMailbox {
  static constexpr int kSlots = 3;
  Pipeline<kSlots> pipe;
  uint32_t number[kSlots];

  __device__ __forceinline__ void init() { pipe.init(1); }
  __device__ __forceinline__ uint32_t slot(uint32_t message) const {
    return ptx::shared_address(&number[message % kSlots]);
  }
  __device__ __forceinline__ void send(uint32_t message, uint32_t tile) const {
    pipe.wait_empty(message);
    ptx::store_in(slot(message), tile, pipe.full_barrier(message), 1);
  }
  __device__ __forceinline__ uint32_t receive(uint32_t message) const {
    ptx::barrier_expect(pipe.full_barrier(message), sizeof(uint32_t));
    pipe.wait_full(message);
    const uint32_t tile = ptx::load_shared(slot(message));
    ptx::barrier_arrive_in(ptx::address_after(pipe.empty_barrier(message), tile), 0);
    return tile;
  }
};
struct NoMailbox {
  __device__ __forceinline__ void init() {}
};

// Whether a slot of the schedule is empty, and so are all tiles with larger numbers: these are numbered slot
// by slot (find_packed_work), sorted sequences have the first slots, and no other entry's schedule follows.
__device__ __forceinline__ bool ends_schedule(const Problem& p, const TileWork& slot) {
  return p.packed() && slot.tiles == 0 && p.batch <= kMostSorted && p.leading.rank == 0;
}

// One thread of a worker runs the scheduler. kRows: rows of a CTA's tile; kUneven: see find_work().
template <Over over, int kRows, int kCluster, int kTeams, class Mailbox, bool kUneven = false>
struct TileScheduler {
  const PersistentTiles& tiles;
  Mailbox& mailbox;
  uint32_t messages = 0;

  static __device__ __forceinline__ uint32_t workers() { return gridDim.x / kCluster * kTeams; }

  static __device__ __forceinline__ uint32_t first(int team) {
    return blockIdx.x / kCluster + team * gridDim.x;
  }
  // The next number of the counter; all CTAs of a cluster get the same one.
  __device__ __forceinline__ uint32_t take() {
    const uint32_t message = messages++;
    if constexpr (kCluster > 1)
      if (ptx::cluster_rank() > 0) return mailbox.receive(message);
    const uint32_t number = atomicAdd(tiles.counter, 1u);
    if constexpr (kCluster > 1) mailbox.send(message, number);
    return number;
  }
  // The worker's tile after `number`. Should be called late: a tile that is taken during a long tile starts
  // only after it, when the other workers may have no tiles left.
  __device__ __forceinline__ uint32_t next(uint32_t number) {
    return tiles.counter ? workers() + take() : number + workers();
  }
  // `rows`: of a tile; `slots` and `order`: see find_work().
  __device__ __forceinline__ BlockWork work(const Problem& p, uint32_t number,
                                            int32_t rows = kCluster * kRows, int32_t slots = 0,
                                            KeyTileOrder order = {}) const {
    // A constant for queries, so that forward kernels have no value of their own to load.
    const uint32_t last = over == Over::kKeys ? tiles.heads.last : HeadGroups{}.last;
    return find_work<over, kUneven>(p, tiles.schedule, tiles.tiles_per_head, rows, {number, tiles.count},
                                    {tiles.heads.size, last}, slots, order);
  }
};

}  // namespace jax_flash
