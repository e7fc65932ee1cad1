// The backward for sm_90a and head dims above 128. At 256, dK and dV of 128 keys would take all registers of
// an SM, so a cluster of two CTAs shares a key tile [N, d], 64 keys each. Both step through the same query
// tiles [M, d]. Each CTA loads half of Q and dO for both, and computes half of the columns of dQ from all
// keys of the tile, for which the CTAs exchange dS.
//
//   producer warpgroup               consumer warpgroups, each for all 64 keys of the CTA; step i:
//
//   warp 0, a thread: scheduler      1: Sᵀ = K Qᵀ, Pᵀ = exp(Sᵀ − lse)    2: dK += dSᵀ Q of step i − 1
//   warp 1, a thread: K, Q by TMA       Pᵀ to shared memory ── p_pipe ──►   dPᵀ = V dOᵀ
//   warp 2: statistics                  dV += Pᵀ dO of step i − 1           dSᵀ = Pᵀ ∘ (dPᵀ − delta)
//     lse, delta, bias, mask                                                dSᵀ to shared memory of both CTAs
//   warp 3, a thread: V, dO by TMA                                              │ ds_pipe, parts
//                                    3: dQ = dS K, and sums += dQ        ◄─────┘
//
// dV, dK and dQ each have a warpgroup, with as many registers as its sum needs. The three wait for each other
// only at pipelines of shared memory. If the score has a derivative or dropout, 1 passes W = Pᵀ ∘ score'(Sᵀ)
// to 2 instead of Pᵀ, negated where dropout drops the element.
//
// At head dim 512, dK and dV of 64 keys take all registers of an SM. So above 256 both CTAs work on the same
// 64 keys and queries (kSplitsColumns), each on half of the columns of K, V, Q, dO, dK, dV and dQ. They send
// each other their parts of Sᵀ and dPᵀ, and both compute all of P and dS.
//
// A cluster may consist of one CTA with 64 keys, whose steps come from a list of its own.
//
// docs/kernels/hopper-backward.md has the reasons and timings.
#pragma once

#include "core/families/hopper_layout.h"
#include "core/plan/launch_plan.h"
#include "cuda/backward/hopper_cluster_consumer.cuh"
#include "cuda/backward/hopper_cluster_dk.cuh"
#include "cuda/backward/hopper_cluster_dq.cuh"
#include "cuda/backward/hopper_cluster_load.cuh"
#include "cuda/backward/hopper_cluster_state.cuh"
#include "cuda/hopper/roles.cuh"
#include "cuda/hopper/tile_scheduler.cuh"
#include "cuda/ptx/registers.cuh"
#include "cuda/score/hopper_gradient.cuh"
#include "cuda/tensor_map.h"
#include "cuda/tile/operands.cuh"

namespace jax_flash {

// The kernel of a row of csrc/kernels.def. A CTA's tiles of K, Q, V and dO are stored as two halves of their
// columns: with four warpgroups ptxas has registers for wgmmas of at most 128 columns, and a CTA with keys of
// its own needs half of K's columns for dQ.
template <class T, Row R, ScoreKind Kind>
struct BackwardClusterSm90 {
  using Element = T;
  static constexpr int HeadDim = R.head_dim, ValueDim = R.value_dim, M = R.block_m, N = R.block_n;
  static constexpr ScoreKind kKind = Kind;
  static constexpr bool kStoresDq = false, kLoadsEarly = false;
  static constexpr bool kOrdered = true;  // tickets may order the additions to dQ
  static constexpr bool kStartsFromDelta = false, kOmitsDropoutScale = false, kBiasByTma = false;
  static constexpr int kCluster = hopper::backward_cluster_ctas(R), kConsumers = 3, kThreads = R.warps * 32;
  // The CTAs of a cluster either share their keys and split the columns (kSharers = 2, kKeyParts = 1), or
  // split the keys (1, 2); (1, 1) is a cluster of one.
  static constexpr int kSharers = hopper::sharers(R), kKeyParts = kCluster / kSharers;
  static constexpr bool kSplitsColumns = kSharers > 1;
  static constexpr int kM = M, kN = N, kStages = R.stages;
  // A bias or mask is staged in tiles only without other options, because registers would spill.
  static constexpr ScoreKind kTilesOf = Kind == ScoreKind::kGeneralDropout ? ScoreKind::kPlain : Kind;
  static constexpr auto kHas =
      hopper::backward_cluster_stages(R, 2 * score_tile_bytes(kTilesOf, M, kConsumerRows));
  static constexpr int kDoStages = kHas.dout_halves, kDsStages = kHas.ds;
  static constexpr bool kDqByTma = kHas.dq;
  // Columns of dQ that one wgmma computes.
  static constexpr int kDqColumns = (HeadDim > 192 ? HeadDim / 4 : HeadDim / 2) / kSharers;
  using KHalf = SharedTile<T, kConsumerRows, HeadDim / kSharers / 2>;
  using VHalf = SharedTile<T, kConsumerRows, ValueDim / kSharers / 2>;
  using QHalf = SharedTile<T, M, HeadDim / kSharers / 2>;
  using DoHalf = SharedTile<T, M, ValueDim / kSharers / 2>;
  using DsTile = SharedTile<T, N, M>;
  using S = TransposedAccumulator<1, M / 8>;
  using Score = typename std::conditional_t<stages_tiles(kTilesOf), GradientScoreOf<Kind, S>,
                                            HopperScoreOf<Kind, S>>::type;
  using Tiles = GradientTiles<kTilesOf, T, M, kConsumerRows, hopper::backward_cluster_score_bytes(R, kHas)>;
  using Fragments = FragmentsA<T, 1, M / 16>;
  using DKHalf = Accumulator<1, QHalf::kColumns / 8>;
  using DVHalf = Accumulator<1, DoHalf::kColumns / 8>;
  using DQ = Accumulator<1, kDqColumns / 8>;
  // Registers per thread of the producers and of the warpgroups that add up dV, dK and dQ. The warpgroup of
  // dV also computes the score's derivative.
  static constexpr bool kWide = HeadDim > 192;
  static constexpr int kProducerRegisters = Score::kScalesGradient ? 40 : 48,
                       kDvRegisters = (kWide ? 256 : 240) - kProducerRegisters,
                       kDkRegisters = kWide ? 192 : 176, kDqRegisters = kWide ? 64 : 96;
  using Shared = BackwardClusterShared<BackwardClusterSm90>;
  struct Maps {
    CUtensorMap query, dout, key, value;
  };
  static_assert(N == kKeyParts * kConsumerRows && M == kConsumerRows && kThreads == 4 * kWarpgroup);
  static_assert(kWarpgroup * (kProducerRegisters + kDvRegisters + kDkRegisters + kDqRegisters) <= 65536);
  static_assert(sizeof(Shared) - sizeof(typename Tiles::Buffer) <=
                hopper::backward_cluster_shared_bytes(R, kHas));
  static_assert(sizeof(Shared) <= hopper::kMaxSharedBytes);
};

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    backward_cluster_sm90(const __grid_constant__ Problem p, const __grid_constant__ typename C::Maps maps,
                          const __grid_constant__ PersistentTiles tiles,
                          const __grid_constant__ KeyGrid grid) {
  using Shared = typename C::Shared;
  auto& shared = *reinterpret_cast<Shared*>(ptx::dynamic_shared_1024());
  const int warpgroup = warpgroup_index(), warp = static_cast<int>(threadIdx.x) / 32;
  if (threadIdx.x == 0) shared.init();
  __syncthreads();
  if constexpr (C::kCluster > 1) ptx::sync_cluster();
  if (warpgroup == 0) {
    ptx::give_registers<C::kProducerRegisters>();
    ClusterGradientProducer<C> producer{{p, maps, shared, grid}};
    const bool leads = threadIdx.x % 32 == 0;
    if (warp == 0 && leads) producer.schedule(tiles, shared.mailbox);
    if (warp == 1 && leads) producer.load_queries();
    if (warp == 2) producer.load_statistics();
    if (warp == 3 && leads) producer.load_douts();
  } else if (warpgroup == 1) {
    ptx::take_registers<C::kDvRegisters>();
    ScoreConsumer<C>(p, shared, grid).run();
  } else if (warpgroup == 2) {
    ptx::take_registers<C::kDkRegisters>();
    ScoreGradientConsumer<C>(p, shared, grid).run();
  } else {
    ptx::give_registers<C::kDqRegisters>();
    QueryGradientConsumer<C>(p, shared, grid).run();
  }
  if constexpr (C::kCluster > 1) {
    __syncwarp();
    ptx::sync_any_group(0, C::kThreads);
    ptx::sync_cluster_of_any_lanes();  // the other CTA may access this CTA's shared memory until here
  }
}

template <class C>
cudaError_t make_cluster_maps(typename C::Maps& maps, const Problem& p) {
  const int32_t batch = p.packed() ? 1 : p.batch, rows = C::kM / C::kKeyParts;
  const struct {
    CUtensorMap& map;
    const View& view;
    MapShape shape;
  } all[] = {
      {maps.query, p.query, {p.head_dim, p.heads, p.q_rows, batch, C::QHalf::kPanel * 8, rows}},
      {maps.dout, p.dout, {p.value_dim, p.heads, p.q_rows, batch, C::DoHalf::kPanel * 8, rows}},
      {maps.key, p.key, {p.head_dim, p.kv_heads, p.k_rows, batch, C::KHalf::kPanel * 8, kConsumerRows}},
      {maps.value, p.value, {p.value_dim, p.kv_heads, p.k_rows, batch, C::VHalf::kPanel * 8, kConsumerRows}},
  };
  for (const auto& [map, view, shape] : all) {
    if (cudaError_t e = make_tensor_map(map, p, view, shape); e != cudaSuccess) return e;
  }
  return cudaSuccess;
}

}  // namespace jax_flash
