// The backward for sm_90a and head dim 128 in 2-CTA clusters. A cluster works on 256 keys of a KV head, 128 in
// each CTA, and both CTAs step through the same query tiles. Each loads half of Q and dO for both. They take
// turns to compute dQ, each for every second step and from all 256 keys: for these it has K of both, and the
// other CTA sends dS to it. So half as many bytes are read from L2 and added to dQ there as in
// cuda/backward/hopper.cuh, whose roles and order this kernel has.
//
// A consumer that writes a stage of dS needs no release: it has waited for Q of this step, which follows the
// last product of both CTAs two steps before, and the stage's dQ was computed at least three steps before.
#pragma once

#include "core/families/hopper_layout.h"
#include "cuda/backward/hopper_load.cuh"
#include "cuda/backward/hopper_pair_consumer.cuh"
#include "cuda/backward/hopper_state.cuh"
#include "cuda/hopper/tile_scheduler.cuh"
#include "cuda/ptx/registers.cuh"
#include "cuda/score/hopper_gradient.cuh"
#include "cuda/tensor_map.h"
#include "cuda/tile/operands.cuh"

namespace jax_flash {

template <class C>
struct BackwardPairShared {
  static constexpr int kStages = C::kStages;
  alignas(1024) uint8_t k[C::KTile::kBytes];  // of both CTAs
  alignas(1024) uint8_t v[C::VTile::kBytes];  // of this CTA's keys
  alignas(1024) uint8_t q[kStages][C::QTile::kBytes];
  alignas(1024) uint8_t d_out[kStages][C::DoTile::kBytes];
  alignas(1024) uint8_t ds[C::kDsStages][C::DsTile::kBytes];  // dSᵀ of both CTAs
  alignas(1024) float dq[C::kDqByTma ? 2 : 0][kConsumerRows * C::kDqColumns];
  QueryStatistics<C::kM> statistics[kStages];
  int32_t large_lse[kStages];
  [[no_unique_address]] StepRing<false> step_ring;
  using Tile = KeyTileState<typename C::Element, C::kCluster * C::kConsumers, NoScoreOperands>;
  Tile tiles[kKeyTileStates];
  TileMailbox mailbox;
  Pipeline<kKeyTileStates> state_pipe;
  Pipeline<1> ending_pipe;
  Pipeline<1> key_pipe;            // released in both CTAs
  Pipeline<kStages> q_pipe, do_pipe;  // likewise
  Pipeline<kStages> ready_pipe;
  Pipeline<C::kDsStages> ds_pipe, sent_pipe;

  __device__ __forceinline__ void init() {
    constexpr uint32_t kConsumers = C::kConsumers * kConsumerWarps * ptx::kWarpArrivals,
                       kBoth = C::kCluster * C::kConsumers * kConsumerWarps;
    mailbox.init();
    state_pipe.init(kConsumers + ptx::kWarpArrivals + 1);
    ending_pipe.init(1);
    key_pipe.init(kBoth);
    q_pipe.init(C::kSharesLoads ? kBoth : kConsumers);
    do_pipe.init(C::kSharesLoads ? kBoth : kConsumers);
    ready_pipe.init(kConsumers, ptx::kWarpArrivals);
    ds_pipe.init(kConsumers, kConsumers + ptx::kWarpArrivals);
    sent_pipe.init(kConsumers);
    ptx::fence_barriers();
  }
};

template <class T, Row R>
struct BackwardPairSm90 {
  using Element = T;
  static constexpr int HeadDim = R.head_dim, ValueDim = R.value_dim, M = R.block_m, N = R.block_n;
  static constexpr ScoreKind kKind = ScoreKind::kPlain;
  static constexpr bool kOrdered = false;
  static constexpr int kCluster = hopper::kClusterCtas, kConsumers = 2, kThreads = R.warps * 32;
  static constexpr int kM = M, kN = N, kOwnKeys = N / kCluster, kStages = R.stages;
  static constexpr bool kDqByRows = false, kAlternates = true, kStartsFromDelta = true;
  static constexpr bool kPermutesQueries = true;
  static constexpr bool kDropDq = R.multicast == 3 || R.multicast == 11, kSharesLoads = R.multicast != 6, kPeeksReady = R.multicast == 5, kPeeksDs = R.multicast == 5, kPins = false, kDqEarly = false, kShareEarly = false;
  static constexpr int kDqPlace = R.multicast == 2 ? 1 : R.multicast == 4 ? 2 : 0;
  static constexpr bool kAddsLast = R.multicast >= 12, kDqByTma = R.multicast == 10 || R.multicast == 11 || R.multicast == 13;
  static constexpr int kDsStages = kDqByTma ? 1 : 2, kDqColumns = HeadDim / 2;
  using KTile = SharedTile<T, N, HeadDim>;
  using VTile = SharedTile<T, kOwnKeys, ValueDim>;
  using QTile = SharedTile<T, M, HeadDim>;
  using DoTile = SharedTile<T, M, ValueDim>;
  using DsTile = SharedTile<T, N, M>;
  using S = TransposedAccumulator<1, M / 8>;
  using Score = GradientScore<kKind, S>;
  using Fragments = FragmentsA<T, 1, M / 16>;
  using DK = Accumulator<1, HeadDim / 8>;
  using DV = Accumulator<1, ValueDim / 8>;
  using DQ = Accumulator<1, kDqColumns / 8>;
  using Shared = BackwardPairShared<BackwardPairSm90>;
  struct Maps {
    CUtensorMap query, dout, key, value;
  };
  static_assert(kOwnKeys == kConsumers * kConsumerRows && M == kConsumerRows && kThreads == 3 * kWarpgroup);
  static_assert(sizeof(Shared) <= hopper::kMaxSharedBytes);
};

template <class C>
struct PairProducer : GradientProducer<C> {
  using Base = GradientProducer<C>;
  using Tile = typename Base::Tile;
  using Base::maps, Base::p, Base::shared, Base::step_use, Base::tile_index;

  // Waits for a stage in both CTAs, and multicasts this CTA's half of the rows of a tile to them.
  template <class TileShape, class Pipe>
  __device__ __forceinline__ void load_half(const Pipe& pipe, uint32_t use, const uint8_t* to,
                                            const CUtensorMap& map, ptx::Coordinates at) const {
    constexpr int kRows = TileShape::kRows / C::kCluster;
    const int32_t first = static_cast<int32_t>(ptx::cluster_rank()) * kRows;
    pipe.wait_empty(use);
    ptx::barrier_expect(pipe.full_barrier(use), TileShape::kBytes);
    if constexpr (!C::kSharesLoads) {
      load_rows<TileShape>(ptx::shared_address(to), 0, map, pipe.full_barrier(use), at);
      return;
    }
    at.row += first;
    load_rows<TileShape, C::kCluster>(ptx::shared_address(to), first, map, pipe.full_barrier(use), at);
  }

  __device__ __forceinline__ void load_keys(const Tile& tile) const {
    const int32_t first = static_cast<int32_t>(ptx::cluster_rank()) * C::kOwnKeys,
                  key = tile.work.tile.k_begin + tile.work.tile.row + first;
    const uint32_t full = shared.key_pipe.full_barrier(tile_index);
    shared.key_pipe.wait_empty(tile_index);
    ptx::barrier_expect(full, C::KTile::kBytes + C::VTile::kBytes);
    load_rows<typename C::KTile, C::kCluster>(ptx::shared_address(shared.k), first, maps.key, full,
                                              coordinates_of(p.key, tile.work, tile.kv_head, key));
    load_rows<typename C::VTile>(ptx::shared_address(shared.v), 0, maps.value, full,
                                 coordinates_of(p.value, tile.work, tile.kv_head, key));
  }

  // One thread loads Q and dO of the first step, K and V, then Q and dO of the other steps.
  __device__ __forceinline__ void load_tiles() {
    Base::for_steps(
        [&](const Tile& tile, const QueryStep& step) {
          const BlockWork& work = tile.work;
          const uint32_t use = step.number, stage = use % C::kStages;
          const int32_t head = work.head + step.head, row = work.tile.q_begin + step.tile * C::kM;
          load_half<typename C::QTile>(shared.q_pipe, use, shared.q[stage], maps.query,
                                       coordinates_of(p.query, work, head, row));
          load_half<typename C::DoTile>(shared.do_pipe, use, shared.d_out[stage], maps.dout,
                                        coordinates_of(p.dout, work, head, row));
          if (use == step_use) load_keys(tile);
          if (Base::ends_soon(tile, step)) shared.ending_pipe.arrive(tile_index);
        },
        [&](const Tile& tile) {
          if (tile.walk.tiles.empty()) Base::skip_keys();
          shared.state_pipe.release_by_thread(tile_index);
        });
  }
};

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    backward_pair_sm90(const __grid_constant__ Problem p, const __grid_constant__ typename C::Maps maps,
                       const __grid_constant__ PersistentTiles tiles, const __grid_constant__ KeyGrid grid) {
  using Shared = typename C::Shared;
  auto& shared = *reinterpret_cast<Shared*>(ptx::dynamic_shared_1024());
  const int warpgroup = warpgroup_index(), warp = static_cast<int>(threadIdx.x) / 32;
  if (threadIdx.x == 0) shared.init();
  __syncthreads();
  ptx::sync_cluster();
  if (warpgroup == 0) {
    ptx::give_registers<producer_registers(C::kConsumers)>();
    PairProducer<C> producer{{p, maps, shared, grid}};
    const bool leads = threadIdx.x % 32 == 0;
    if (warp == 0 && leads) producer.schedule(tiles, shared.mailbox);
    if (warp == 1 && leads) producer.load_tiles();
    if (warp == 2) producer.load_statistics();
  } else {
    ptx::take_registers<consumer_registers(C::kConsumers)>();
    PairConsumer<C>(p, shared, grid, warpgroup - 1).run();
  }
  __syncwarp();
  ptx::sync_any_group(0, C::kThreads);
  ptx::sync_cluster_of_any_lanes();  // the other CTA may access this CTA's shared memory until here
}

template <class C>
cudaError_t make_pair_maps(typename C::Maps& maps, const Problem& p) {
  const int32_t batch = p.packed() ? 1 : p.batch, rows = C::kSharesLoads ? C::kM / C::kCluster : C::kM;
  const struct {
    CUtensorMap& map;
    const View& view;
    MapShape shape;
  } all[] = {
      {maps.query, p.query, {p.head_dim, p.heads, p.q_rows, batch, C::QTile::kPanel * 8, rows}},
      {maps.dout, p.dout, {p.value_dim, p.heads, p.q_rows, batch, C::DoTile::kPanel * 8, rows}},
      {maps.key, p.key, {p.head_dim, p.kv_heads, p.k_rows, batch, C::KTile::kPanel * 8, C::kOwnKeys}},
      {maps.value, p.value, {p.value_dim, p.kv_heads, p.k_rows, batch, C::VTile::kPanel * 8, C::kOwnKeys}},
  };
  for (const auto& [map, view, shape] : all) {
    if (cudaError_t e = make_tensor_map(map, p, view, shape); e != cudaSuccess) return e;
  }
  return cudaSuccess;
}

}  // namespace jax_flash
