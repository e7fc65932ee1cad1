// What the warps of cuda/backward/hopper.cuh share: the key tile's state, tiles of the operands, pipelines.
#pragma once

#include <cstdint>
#include <limits>

#include "core/families/hopper_layout.h"
#include "core/plan/launch_plan.h"
#include "cuda/hopper/pipeline.cuh"
#include "cuda/hopper/roles.cuh"
#include "cuda/tile/copy.cuh"
#include "cuda/work.cuh"

namespace jax_flash {

// What the roles know of the CTA's key tile. One thread writes it, before there are roles.
template <class T, int kConsumers>
struct KeyTileState {
  BlockWork work;
  Band band;
  Interval tiles;              // query tiles of which some row sees one of the keys
  Interval whole[kConsumers];  // of those, the tiles whose rows all see all keys of a consumer
  Interval seen;               // query rows that see a key of the sequence
  Interval clean;              // query rows whose Q and dO may be multiplied: the seen ones, and zeros
  int32_t clean_keys;          // rows of K and V that may be: those in use, and zeros
  int32_t kv_head, heads;      // the KV head; query heads of its group
  const float *lse, *delta;    // of the first head
  GlobalRows<T> dkey, dvalue;

  // False: the tile has no rows.
  template <class C>
  __device__ __forceinline__ bool prepare(const Problem& p) {
    const TileWork& tile = work.tile;
    if (tile.row >= tile.end) return false;
    band = work.band_inline(p);
    const Interval rows = band.queries(tile.row, tile.used_keys());
    tiles = rows.empty() ? Interval{0, 0} : Interval{rows.lo / C::kM, (rows.hi - 1) / C::kM + 1};
    for (int i = 0; i < kConsumers; ++i) {
      const int32_t key = tile.row + i * kConsumerRows;
      const Interval all = band.common_queries(key, key + kConsumerRows);
      whole[i] = {(all.lo + C::kM - 1) / C::kM, all.hi / C::kM};
    }
    // Rows past the operand's end come as zeros; those of other sequences, or unused ones, may hold NaN.
    constexpr int32_t kNone = std::numeric_limits<int32_t>::max();
    seen = clean = band.queries(0, band.k_len);
    if (tile.q_begin + seen.hi >= p.q_rows) clean.hi = kNone;
    clean_keys = tile.k_begin + tile.k_len < p.k_rows ? max(tile.k_len - tile.row, 0) : kNone;
    heads = p.heads / p.kv_heads;
    kv_head = work.head / heads;
    lse = p.lse.as<const float>() + work.offset(p, p.lse, work.head, tile.q_begin);
    delta = p.delta.as<const float>() + work.offset(p, p.delta, work.head, tile.q_begin);
    dkey = {p.dkey.as<T>() + work.offset(p, p.dkey, kv_head, tile.k_begin), p.dkey.row, p.head_dim};
    dvalue = {p.dvalue.as<T>() + work.offset(p, p.dvalue, kv_head, tile.k_begin), p.dvalue.row, p.value_dim};
    return true;
  }
};

// lse, in powers of two, and delta of a query tile.
template <int M>
struct QueryStatistics {
  float lse[M], delta[M];
};

// Zeros the rows of a tile outside `clean`: they may hold NaN, and 0 · NaN is NaN. The share of one of
// `threads`.
template <class Tile>
__device__ __forceinline__ void clear_rows(uint8_t* tile, Interval clean, int thread, int threads) {
  const uint32_t to = ptx::shared_address(tile);
#pragma unroll 1
  for (int at = thread; at < Tile::kRows * Tile::kChunks; at += threads) {
    const int row = at / Tile::kChunks;
    if (!clean.contains(row)) ptx::store_shared(to + Tile::offset(row, at % Tile::kChunks), uint4{});
  }
}

template <class C>
struct BackwardShared {
  static constexpr int kConsumers = C::kConsumers, kStages = C::kStages;
  alignas(1024) uint8_t k[C::KTile::kBytes];
  alignas(1024) uint8_t v[C::VTile::kBytes];
  alignas(1024) uint8_t q[kStages][C::QTile::kBytes];
  alignas(1024) uint8_t d_out[kStages][C::DoTile::kBytes];
  alignas(1024) uint8_t ds[C::kDsStages][C::DsTile::kBytes];  // dSᵀ
  alignas(1024) uint8_t dq[kConsumers][C::DqTile::kBytes];
  QueryStatistics<C::kM> statistics[kStages];
  int32_t coarse[kStages];  // whether the rounding of some lse would show in P
  KeyTileState<typename C::Element, kConsumers> tile;
  int32_t used;  // whether there is a tile
  Pipeline<1> k_pipe, v_pipe;
  Pipeline<kStages> q_pipe, do_pipe;
  Pipeline<kStages> ready_pipe;                // full when lse and delta are stored, and Q and dO clean
  Pipeline<C::kDsStages> ds_pipe[kConsumers];  // a consumer's keys of dSᵀ; the other consumer releases them
  Pipeline<1> dq_pipe[kConsumers];

  __device__ __forceinline__ void init() {
    constexpr uint32_t kConsumer = kConsumerWarps * ptx::kWarpArrivals;
    k_pipe.init(1);
    v_pipe.init(1);
    q_pipe.init(kConsumers * kConsumer);
    do_pipe.init(kConsumers * kConsumer);
    ready_pipe.init(kConsumers * kConsumer, ptx::kWarpArrivals);
    for (auto& pipe : ds_pipe) pipe.init(kConsumer, kConsumer);
    for (auto& pipe : dq_pipe) pipe.init(1, kConsumer);
    ptx::fence_barriers();
  }
};

}  // namespace jax_flash
