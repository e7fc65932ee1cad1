// Calls of few key tiles whose KV heads suffice for all SMs: a CTA goes through all key tiles of a KV head,
// and keeps the head's float32 sums of dQ in memory of its own, which stays in L2. The first key tile that a
// query tile sees starts its sums. The last one adds them to its own dQ, rounds and stores it. So no kernel
// clears or rounds sums, and their order never changes.
#pragma once

#include <cstdint>

#include "cuda/backward/hopper_one_key_tile.cuh"
#include "cuda/backward/hopper_sums.cuh"
#include "cuda/hopper/roles.cuh"
#include "cuda/hopper/tile_scheduler.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/tile/copy.cuh"
#include "cuda/work.cuh"

namespace jax_flash {

// The sums of a query tile in shared memory, in the order that they have in global memory.
template <int kBytes>
struct KeptSums {
  alignas(16) uint8_t sums[kBytes];
};
struct NoKeptSums {};

// The rows of dQ in a key tile's state, and the query tiles that see the key tile before it, and after it.
template <class T>
struct KeptDqRows : GlobalRows<T> {
  Interval before, after;

  // Whether this key tile is the first, or the last, that a query tile sees.
  __device__ __forceinline__ bool starts(int32_t query_tile) const {
    return !uniform(before).contains(query_tile);
  }
  __device__ __forceinline__ bool ends(int32_t query_tile) const {
    return !uniform(after).contains(query_tile);
  }
};

// Finds the key tiles of a KV head, one after the other, then those of another head.
template <class Producer>
__device__ __forceinline__ void schedule_tiles_of_heads(Producer& of, const PersistentTiles& all) {
  using C = typename Producer::Config;
  auto& shared = of.shared;
  const uint32_t heads = reload(of.p).kv_heads, count = all.count / all.tiles_per_head;
  const auto tile = [&](uint32_t index) -> auto& { return shared.tiles[index % kKeyTileStates<C>]; };
  uint32_t head = blockIdx.x;
  while (head < count) {
#pragma unroll 1
    for (int32_t row = 0; row < reload(of.p).k_rows; row += C::kN) {
      shared.state_pipe.wait_empty(of.tile_index);
      auto& next = tile(of.tile_index);
      if (row == 0) {
        next.work = fixed_work<Over::kKeys>(reload(of.p), heads, head, 0, C::kN);
        next.walk.heads_inner = 0, next.walk.direction = 1;
        next.template prepare<C>(reload(of.p), of.grid, [&of] { of.let_load(); });
      } else {
        next.template follow<C>(tile(of.tile_index - 1), reload(of.p), [&of] { of.let_load(); });
      }
      shared.state_pipe.arrive(of.tile_index);
      shared.ending_pipe.wait_full(of.tile_index++);
    }
    head = all.counter ? gridDim.x + atomicAdd(all.counter, 1u) : head + gridDim.x;
  }
  of.end_tiles();
}

// Calls visit(global, shared, n) for the sums that a thread has in the columns from 8 n on. `tile`: the sums
// of a query tile.
template <class Consumer, class Visit>
__device__ __forceinline__ void for_sums(Consumer& of, float* tile, Visit visit) {
  using C = typename Consumer::Config;
  const Placement at = dq_of_warp(of);
  if (C::kTakes96Queries && at.row >= C::kM) return;
  const int32_t d = of.p.head_dim, first = sum_offset<C::kM>(d, at.row, at.column) + 4 * Consumer::lane();
  float* const global = tile + first;
  const uint32_t shared = ptx::shared_address(of.shared.kept.sums) + first * sizeof(float);
#pragma unroll
  for (int n = 0; n < C::DQ::kColumnTiles; ++n) {
    if (at.column + n * kSumColumns >= d) break;
    const uint32_t offset = sum_offset<C::kM>(0, 0, n * kSumColumns);
    visit(global + offset, shared + offset * static_cast<uint32_t>(sizeof(float)), n);
  }
}

// The query tile of a step. `sum`: its index among those of the group.
template <class Consumer>
__device__ __forceinline__ int32_t query_tile_of(const Consumer& of, int32_t sum) {
  const int32_t tiles = of.grid.sums.tiles;
  return sum < tiles ? sum : static_cast<uint32_t>(sum) % static_cast<uint32_t>(tiles);
}

// Before a step's dQ is multiplied: starts to copy the sums that it completes. Each thread copies those that
// it has added to itself, so that nothing has to be waited for.
template <class Consumer>
__device__ __forceinline__ void fetch_sums(Consumer& of, int32_t sum) {
  const auto& dquery = of.tile().dquery;
  const int32_t query_tile = query_tile_of(of, sum);
  if (dquery.starts(query_tile) || !dquery.ends(query_tile)) return;
  for_sums(of, sum_tile<Consumer::Config::kM>(of.p, of.tile().sums, sum),
           [](const float* from, uint32_t to, int) { ptx::cp_async_16(to, from); });
  ptx::cp_async_commit();
}

// Starts the sums of a query tile with dQ, adds dQ to them, or adds them to dQ and stores it.
template <class Consumer>
__device__ __forceinline__ void keep_dq(Consumer& of, int32_t sum) {
  const auto& dquery = of.tile().dquery;
  const int32_t query_tile = query_tile_of(of, sum);
  const bool starts = dquery.starts(query_tile), ends = dquery.ends(query_tile);
  if (!starts && !ends) return add_dq(of, sum);
  if (starts && !ends) {
    for_sums(of, sum_tile<Consumer::Config::kM>(of.p, of.tile().sums, sum), [&](float* to, uint32_t, int n) {
      const auto& x = of.dq.x[0][n];
      *reinterpret_cast<float4*>(to) = make_float4(x[0], x[1], x[2], x[3]);
    });
    return;
  }
  if (!starts) {
    ptx::cp_async_wait<0>();
    for_sums(of, of.tile().sums, [&](const float*, uint32_t from, int n) {
      const float4 x = ptx::load_shared_float4(from);
      auto& dq = of.dq.x[0][n];
      dq[0] += x.x, dq[1] += x.y, dq[2] += x.z, dq[3] += x.w;
    });
  }
  store_dq(of, sum);
}

}  // namespace jax_flash
