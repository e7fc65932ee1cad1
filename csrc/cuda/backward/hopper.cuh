// The backward for sm_90a: TMA, mbarrier, wgmma, warp specialisation. FlashAttention-3 (Shah et al., 2024).
//
// The grid is persistent: one CTA per SM works on key tiles [N, d] of one KV head, one after the other, and
// steps through the query tiles [M, d] of all heads of the group.
//
//   producer warpgroup                             consumer warpgroups, 64 keys each
//
//   warp 0, a thread: scheduler                    wait K and V; dK = dV = 0; for steps i:
//     key tile, band, query tiles                    Sᵀ = K Qᵀ, dPᵀ = V dOᵀ
//        │ state_pipe, 2 tiles                       Pᵀ = exp(Sᵀ − lse), dSᵀ = Pᵀ ∘ (dPᵀ − delta)
//        ▼                                           dS to shared memory ── ds_pipe ──► both
//   warp 1, a thread: load   ── Q, dO: kStages ──►   dQ = dS K of step i − 1, dV += Pᵀ dO, dK += dSᵀ Q
//     K, V, Q, dO by TMA     ◄── release ─────────   sums += dQ
//   warp 2: statistics                             scale · dK and dV are stored
//     lse, delta; Q and dO there ── ready_pipe ──►
//
// If the order of sums is fixed, a thread of warp 3 says when consumers may add dQ (sum_pipe).
//
// Rows with tiles of 64 keys have one consumer warpgroup and two CTAs per SM (hopper_single_consumer.cuh).
//
// An arrow is a Pipeline (hopper/pipeline.cuh). docs/kernels/hopper-backward.md has the reasons and timings.
#pragma once

#include <algorithm>

#include "core/families/hopper_layout.h"
#include "core/plan/launch_plan.h"
#include "core/plan/workspace.h"
#include "cuda/backward/head_parts.cuh"
#include "cuda/backward/hopper_cluster.cuh"
#include "cuda/backward/hopper_consumer.cuh"
#include "cuda/backward/hopper_head.cuh"
#include "cuda/backward/hopper_load.cuh"
#include "cuda/backward/hopper_order.cuh"
#include "cuda/backward/hopper_single_consumer.cuh"
#include "cuda/backward/hopper_state.cuh"
#include "cuda/backward/hopper_tickets.cuh"
#include "cuda/backward/query_sums.cuh"
#include "cuda/gradient.cuh"
#include "cuda/hopper/roles.cuh"
#include "cuda/hopper/tile_scheduler.cuh"
#include "cuda/launch.h"
#include "cuda/leading_slices.h"
#include "cuda/ptx/registers.cuh"
#include "cuda/registry.h"
#include "cuda/score/hopper_gradient.cuh"
#include "cuda/tensor_map.h"
#include "cuda/tile/operands.cuh"

namespace jax_flash {

// A row of csrc/kernels.def.
//
// Ordered: the key tiles add dQ to the sums (query_sums.cuh) in their order.
// Rounding: what rounds dQ: clusters (hopper_head.cuh), CTAs that have all keys of a KV head in one tile
// (hopper_one_key_tile.cuh) or in several (hopper_kept_sums.cuh), or another kernel.
template <class T, Row R, ScoreKind Kind, bool Ordered, DqRounding Rounding = DqRounding::kKernel>
struct BackwardSm90 {
  using Element = T;
  static constexpr int HeadDim = R.head_dim, ValueDim = R.value_dim, M = R.block_m, N = R.block_n;
  static constexpr ScoreKind kKind = Kind;
  static constexpr bool kOrdered = Ordered;
  static constexpr int kCluster = 1, kConsumers = N / kConsumerRows, kThreads = R.warps * 32;
  static constexpr int kM = M, kN = N, kStages = R.stages;
  static constexpr bool kRoundsDq = Rounding == DqRounding::kClusters,
                        kKeepsSums = Rounding == DqRounding::kHeads,
                        kStoresDq = Rounding == DqRounding::kCtas || kKeepsSums;
  static constexpr bool kLoadsEarly = Kind == ScoreKind::kPlain;  // other kernels would spill more
  // Whether the scheduler finds a tile only when the one before is about to end.
  static constexpr bool kWaitsForEnd = !kStoresDq || kKeepsSums;
  static constexpr bool kSingle = kConsumers == 1;
  // The plain kernel loads K of the next tile during a tile. So it does V with 128 query rows; with 64 it
  // loads V when the last step has been multiplied, before the last dQ.
  static constexpr bool kLoadsAhead =
      Kind == ScoreKind::kPlain && !Ordered && !kRoundsDq && M % kConsumerRows == 0;
  static constexpr int kValueStages = kLoadsAhead && M == 2 * kConsumerRows ? 2 : 1,
                       kKeyStages = kLoadsAhead && !kStoresDq ? 2 : kValueStages;
  static constexpr bool kValuesApart = kKeyStages != kValueStages;
  using DqRows =
      std::conditional_t<kKeepsSums, KeptDqRows<T>, std::conditional_t<kStoresDq, GlobalRows<T>, NoDqRows>>;
  using Kept = std::conditional_t<kKeepsSums, KeptSums<M * HeadDim* int{sizeof(float)}>, NoKeptSums>;
  static constexpr int kProducerRegisters = kSingle ? 32 : producer_registers(kConsumers),
                       kConsumerRegisters = kSingle ? 224 : consumer_registers(kConsumers);
  // A consumer's part of dQ [M, d]: 64 of the rows, or half of the columns, or all if it is the only one.
  // With 96 rows the second consumer has 32; it multiplies 32 more rows of dS, which are never written or
  // read.
  static constexpr bool kDqByRows = M > kConsumerRows, kTakes96Queries = hopper::takes_96_queries(R);
  static constexpr int kDqColumns = kSingle || kDqByRows ? HeadDim : HeadDim / 2;
  // A half of dQ's columns has whole panels of K: of 16 columns, if the half has 48.
  static constexpr int kKeyPanel = !kDqByRows && kDqColumns % 32 != 0 ? 2 : panel_of(HeadDim / 8);
  using KTile = SharedTile<T, N, HeadDim, false, kKeyPanel>;
  using VTile = SharedTile<T, N, ValueDim>;
  using QTile = SharedTile<T, M, HeadDim>;
  using DoTile = SharedTile<T, M, ValueDim>;
  using DsTile = SharedTile<T, N, hopper::whole_panels(M, kConsumerRows)>;
  using S = TransposedAccumulator<1, M / 8>;
  using Score = GradientScore<Kind, S>;
  // A bias of 128 queries uses the third stage of dS.
  static constexpr bool kSpareDs = stages_bias(Kind) && M > kConsumerRows;
  // Whether consumers alternate in issuing products (ping-pong).
  static constexpr bool kAlternates = M < 2 * kConsumerRows && !kSingle;
  // With four tiles of dS no stage needs to be released: before a consumer overwrites a tile, it has waited
  // for the other consumer's dS of two steps before, which came after that consumer's dQ of four steps
  // before.
  static constexpr bool kReleasesDs = stages_tiles(Kind) || kTakes96Queries || kValueStages > 1;
  static constexpr int kDsStages = hopper::has_few_ds_stages(R) || (kStoresDq && kValueStages > 1)
                                       ? hopper::kFewDsStages
                                   : kReleasesDs ? hopper::kScoreGradientStages - (kSpareDs ? 1 : 0)
                                                 : hopper::kScoreGradientStages + 1;
  // The order of the plain kernel with 64 query rows: dQ and dV are issued before dS is stored, and dPᵀ is
  // added to −delta. A consumer that stores dS has still waited for the other's dS of the step before, which
  // now comes after the other's dQ of three steps before. With 128 rows there are too few registers, and 96
  // gain nothing.
  static constexpr bool kSharesDsLate =
      (Kind == ScoreKind::kPlain || Kind == ScoreKind::kRanges || lists_tiles(Kind)) && M == kConsumerRows;
  static constexpr bool kStartsFromDelta = kSharesDsLate;
  static constexpr bool kOmitsDropoutScale = jax_flash::kOmitsDropoutScale<S, Score>;
  // Whether a step draws dropout's bits for the next step (hopper_dropout.cuh).
  static constexpr bool kDrawsAhead = Kind == ScoreKind::kDropout && M == 2 * kConsumerRows;
  // K stays in registers, so that Sᵀ reads shared memory for Q only: 1.5 to 5 %. Smaller heads have 128 query
  // rows, and larger ones sums of 128 columns, which leave no registers.
  static constexpr bool kKeysInRegisters = HeadDim == 80 || HeadDim == 96;
  // A bias is copied by TMA, which with 64 query rows is slower. There, a branch for tiles of one row would
  // cost calls with a 16-bit bias for each query 3 %.
  static constexpr bool kBiasByTma = stages_bias(Kind) && !stages_mask(Kind) && M == 2 * kConsumerRows;
  static constexpr int kTilesBytes =
      M * HeadDim * int{sizeof(float)} + (kSpareDs ? SharedTile<T, N, M>::kBytes : 0);
  using Tiles = GradientTiles<Kind, T, M, N, kTilesBytes, kBiasByTma || stages_float_bias(Kind)>;
  using Fragments = FragmentsA<T, 1, M / 16>;
  using DK = Accumulator<1, HeadDim / 8>;
  using DV = Accumulator<1, ValueDim / 8>;
  using DQ = Accumulator<1, kDqColumns / 8>;
  using Shared = BackwardShared<BackwardSm90>;
  struct Maps {
    CUtensorMap query, dout, key, value;
    [[no_unique_address]] std::conditional_t<kBiasByTma, CUtensorMap, NoScoreTiles> bias;
  };
  using Consumer = std::conditional_t<kSingle, SingleConsumer<BackwardSm90>, GradientConsumer<BackwardSm90>>;
  static_assert(kThreads == (1 + kConsumers) * kWarpgroup);
  static_assert(kSingle ? lists_tiles(Kind) && M == kConsumerRows && R.blocks == 2 : kConsumers == 2);
  static_assert(kSingle ? 2 * kWarpgroup * (kProducerRegisters + kConsumerRegisters) <= 65536
                        : registers_suffice(kThreads, kConsumers));
  static_assert(M <= 2 * kConsumerRows && M % 32 == 0);
  static_assert(kDqByRows || kDqColumns % (KTile::kPanel * 8) == 0);  // whole panels
  static_assert(!kTakes96Queries || (Kind == ScoreKind::kPlain && HeadDim <= hopper::kHeadDimOf96Queries));
  static_assert(sizeof(Shared) <= hopper::backward_shared_bytes(R));
};

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kSingle ? 2 : 1)
    backward_sm90(const __grid_constant__ Problem p, const __grid_constant__ typename C::Maps maps,
                  const __grid_constant__ PersistentTiles tiles, const __grid_constant__ KeyGrid grid) {
  using Shared = typename C::Shared;
  auto& shared = *reinterpret_cast<Shared*>(ptx::dynamic_shared_1024());
  const int warpgroup = warpgroup_index(), warp = static_cast<int>(threadIdx.x) / 32;
  if (threadIdx.x == 0) shared.init();
  if constexpr (C::kRoundsDq) HeadSums<C>{p, grid.sums}.clear();
  __syncthreads();
  if (warpgroup == 0) {
    ptx::give_registers<C::kProducerRegisters>();
    GradientProducer<C> producer{p, maps, shared, grid};
    const bool leads = threadIdx.x % 32 == 0;
    if constexpr (C::kKeepsSums) {
      if (warp == 0 && leads) schedule_tiles_of_heads(producer, tiles);
    } else if constexpr (C::kStoresDq) {
      if ((warp == 0 || warp == 3) && leads) schedule_heads(producer, tiles.count, warp / 3);
    } else {
      NoMailbox none;
      if (warp == 0 && leads) producer.schedule(tiles, none);
    }
    if (warp == 1 && leads) producer.load_tiles();
    if (warp == 2) producer.load_statistics();
    if constexpr (C::kOrdered) {
      if (warp == 3 && (leads || kWarpOrders<C>)) order_sums(producer);
    }
    if constexpr (kStagesTiles<C>) {
      if (warp == 3) producer.load_score_tiles();
    }
    if constexpr (C::kRoundsDq)
      ptx::acquire_from_cluster(), ptx::release_to_cluster(), ptx::acquire_from_cluster();
  } else {
    ptx::take_registers<C::kConsumerRegisters>();
    if constexpr (C::kRoundsDq) ptx::acquire_from_cluster();
    typename C::Consumer(p, shared, grid, warpgroup - 1).run();
    if constexpr (C::kRoundsDq) ptx::acquire_from_cluster(), HeadSums<C>{p, grid.sums}.round();
  }
}

template <class C>
cudaError_t make_maps(typename C::Maps& maps, const Problem& p) {
  const int32_t batch = p.packed() ? 1 : p.batch;
  const struct {
    CUtensorMap& map;
    const View& view;
    MapShape shape;
  } all[] = {
      {maps.query, p.query, {p.head_dim, p.heads, p.q_rows, batch, C::QTile::kPanel * 8, C::kM}},
      {maps.dout, p.dout, {p.value_dim, p.heads, p.q_rows, batch, C::DoTile::kPanel * 8, C::kM}},
      {maps.key, p.key, {p.head_dim, p.kv_heads, p.k_rows, batch, C::KTile::kPanel * 8, C::kN}},
      {maps.value, p.value, {p.value_dim, p.kv_heads, p.k_rows, batch, C::VTile::kPanel * 8, C::kN}},
  };
  for (const auto& [map, view, shape] : all) {
    if (cudaError_t e = make_tensor_map(map, p, view, shape); e != cudaSuccess) return e;
  }
  if constexpr (C::kBiasByTma) {
    return make_bias_map<typename C::Tiles::BiasTile>(maps.bias, p);
  }
  return cudaSuccess;
}

// Finds the key grid's tables in the workspace, as the plan placed them.
inline KeyGrid make_key_grid(const Problem& p, const LaunchPlan& plan, void* workspace, const QuerySums& sums,
                             int32_t ticket_shift) {
  KeyGrid grid = {segments_of(plan.keys, workspace), static_cast<int32_t>(plan.keys.tiles), sums, nullptr,
                  ticket_shift};
  if (plan.score == ScoreKind::kRanges) {
    const RangeTables tables = range_tables(p, plan.keys, workspace);
    grid.segments = tables.rows, grid.gaps = tables.gaps, grid.blocks = tables.blocks;
  }
  if (lists_tiles(plan.score)) grid.lists = step_lists(p, plan.keys, workspace);
  grid.head_parts = plan.parts;
  if (plan.dq_tickets >= 0)
    grid.tickets = reinterpret_cast<uint32_t*>(static_cast<char*>(workspace) + plan.dq_tickets);
  return grid;
}

template <class C, class T>
cudaError_t launch_backward_sm90(const Problem& p, const LaunchPlan& plan, void* workspace,
                                 cudaStream_t stream) {
  const auto sums = query_sums<C::kM>(p, plan, workspace);
  if (cudaError_t e = clear_sums<C::kM>(p, plan, workspace, sums, stream); e != cudaSuccess) return e;
  const TileGrid& grid = plan.keys;
  if (grid.blocks > 0) {
    typename C::Maps maps;
    cudaError_t e = cudaSuccess;
    if constexpr (kInClusters<C>) {
      e = make_cluster_maps<C>(maps, p);
    } else {
      e = make_maps<C>(maps, p);
    }
    if (e != cudaSuccess) return e;
    PersistentTiles tiles{schedule_of(grid, workspace), static_cast<int32_t>(grid.tiles),
                          static_cast<uint32_t>(grid.blocks), tile_counter(plan, workspace), 1};
    const Problem parts = with_head_parts(p, plan, workspace);
    const int32_t shift = ticket_shift<C>(p);
    if (!kListsSteps<C> && plan.dq_rounding == DqRounding::kKernel) order_tiles<C>(tiles, parts, plan, shift);
    const KeyGrid key_grid = make_key_grid(p, plan, workspace, sums, shift);
    if constexpr (kListsSteps<C>) {
      const uint32_t heads = tiles.count / tiles.tiles_per_head;
      tiles.heads.size = heads_of_one_wave(tiles, plan.persistent_ctas / C::kCluster);
      e = launch_step_order(key_grid.lists, tiles.tiles_per_head, heads, tiles.heads.size, stream);
      if (e != cudaSuccess) return e;
    }
    constexpr size_t kShared = sizeof(typename C::Shared);
    if constexpr (kInClusters<C>) {
      e = launch_clusters(backward_cluster_sm90<C>, C::kCluster, plan.persistent_ctas, C::kThreads, kShared,
                          stream, parts, maps, tiles, key_grid);
    } else {
      e = launch_clusters(backward_sm90<C>, plan.cluster_size,
                          plan.dq_rounding == DqRounding::kClusters ? grid.blocks : plan.persistent_ctas,
                          C::kThreads, kShared, stream, parts, maps, tiles, key_grid);
    }
    if (e != cudaSuccess) return e;
    if (plan.parts > 1) {
      e = sum_head_parts<T>(p, parts, plan.parts, stream);
      if (e != cudaSuccess) return e;
    }
  }
  if (plan.dq_rounding != DqRounding::kKernel) return cudaSuccess;
  Problem scaled = p;
  if constexpr (C::kOmitsDropoutScale) scaled.spec.scale *= dropout_scale(p.spec);
  return convert_sums<T, C::kM>(scaled, sums, grid, workspace, stream);
}

template <class T, Row R>
cudaError_t launch_slice(const Problem& p, const LaunchPlan& plan, void* workspace, cudaStream_t stream) {
  if constexpr (hopper::backward_in_clusters(R)) {
    return launch_score<R>(plan.score, [&]<ScoreKind kKind>() {
      return launch_backward_sm90<BackwardClusterSm90<T, R, kKind>, T>(p, plan, workspace, stream);
    });
  } else {
    return launch_score<R>(plan.score, [&]<ScoreKind kKind>() {
      const auto run = [&]<bool kOrdered, DqRounding kRounding = DqRounding::kKernel>() {
        using C = BackwardSm90<T, R, kKind, kOrdered, kRounding>;
        return launch_backward_sm90<C, T>(p, plan, workspace, stream);
      };
      // A warp that loads bias and mask has no time for tickets; there consumers wait for their own. Calls
      // whose steps are listed have no tickets.
      constexpr bool kOrdered = !stages_tiles(kKind) && !lists_tiles(kKind);
      if constexpr (kKind == ScoreKind::kPlain) {
        using enum DqRounding;
        if (plan.dq_rounding == kClusters) return run.template operator()<false, kClusters>();
        if (plan.dq_rounding == kCtas) return run.template operator()<false, kCtas>();
        if (plan.dq_rounding == kHeads) return run.template operator()<false, kHeads>();
      }
      return plan.dq_tickets < 0 ? run.template operator()<false>() : run.template operator()<kOrdered>();
    });
  }
}

template <class T, Row R>
cudaError_t launch_row(const Problem& p, const LaunchPlan& plan, void* workspace, cudaStream_t stream) {
  const auto launch = [&](const Problem& slice, const LaunchPlan& of_slice) {
    return launch_slice<T, R>(slice, of_slice, workspace, stream);
  };
  return launch_slices(p, plan, &LaunchPlan::keys, workspace, stream, launch);
}

}  // namespace jax_flash
