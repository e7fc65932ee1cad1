// The forward for sm_90a: TMA, mbarrier, wgmma, warp specialisation. FlashAttention-3 (Shah et al., 2024).
//
// The grid is persistent: one CTA per SM works on query tiles [M, d] of one head, one after the other.
//
//   producer warpgroup                                   consumer warpgroups, 64 rows each
//
//   warp 0, a thread: scheduler                          wait Q, tile state
//     tile number, band, key tiles,                      for key tiles n, last to first:
//     where o and lse lie                                  wait K_n     S = Q K_nᵀ, in flight with
//        │ state_pipe, 3 tiles    ◄── release ──┐          wait V_n+1   O ← O + P V_n+1
//        ▼                                      ├────      release K_n  P = 2^(S − m), O ← α O
//   warp 1: load warp             ◄── release ──┘          release V_n+1
//     K, Q, K, V, K, V … by TMA  ── K, V: kStages ──►    O ← O + P V_first, o and lse are stored
//     (pages: Q, V by one more)  ── Q of each       ──►  release Q, tile state
//
//   warp 2, where the score has an input of its own: its warp (segments)
//   the warp after these, where o is stored by TMA: the store warp, from shared memory
//   the warpgroup after the consumers, over float8 pages: widens K and V (hopper_widen.cuh)
//
// If two CTAs of a cluster share a query tile, one consumer of each computes P of its rows and sends it to
// the consumer of the other CTA with the same rows. Each CTA has its columns of V and o
// (hopper/row_exchange.cuh), and both load K together.
//
// An arrow is a Pipeline (hopper/pipeline.cuh): its reader waits for the full barrier, its writer for the
// empty one. Consumers alternate in issuing products (ping-pong). docs/kernels/hopper-forward.md has the
// reasons and timings.
#pragma once

#include <algorithm>
#include <type_traits>

#include "core/families/hopper_layout.h"
#include "core/plan/launch_plan.h"
#include "cuda/forward/hopper_consumer.cuh"
#include "cuda/forward/hopper_heads.cuh"
#include "cuda/forward/hopper_load.cuh"
#include "cuda/forward/hopper_scheduler.cuh"
#include "cuda/forward/hopper_state.cuh"
#include "cuda/forward/hopper_store.cuh"
#include "cuda/hopper/roles.cuh"
#include "cuda/hopper/row_exchange.cuh"
#include "cuda/hopper/tile_scheduler.cuh"
#include "cuda/launch.h"
#include "cuda/load/hopper_dense.cuh"
#include "cuda/load/hopper_lists.cuh"
#include "cuda/load/hopper_pages.cuh"
#include "cuda/ptx/registers.cuh"
#include "cuda/registry.h"
#include "cuda/score/hopper_variants.cuh"
#include "cuda/slices.cuh"
#include "cuda/tile/operands.cuh"

namespace jax_flash {

// A row of csrc/kernels.def. Warps: one producer warpgroup and M / 64 consumers for each of the Teams; with
// one consumer a warpgroup idles, as its registers go to the others; over float8 pages another one widens.
// Each team works on query tiles of its own, so that one team's prologue and epilogue overlap another's loop.
// With Multicast > 1, a cluster has that many CTAs, each with a query tile of its own, and K and V are
// multicast to all. If CTAs share a query tile (Design::kClusterColumns), each has its own columns of V and
// O, and computes P of half of the rows.
template <class T, Row R, ScoreKind Kind, template <class> class KeyLoader = DenseLoader, int Multicast = 1>
struct ForwardSm90 {
  using Element = T;
  static constexpr ScoreKind kKind = Kind;
  static constexpr int kMulticast = Multicast, kSharers = hopper::sharers(R),
                       kCluster = kMulticast * kSharers, kTeams = R.teams;
  static constexpr bool kPacksHeads = R.design == Design::kPackedHeads;
  static constexpr bool kSliced = R.is_sliced();
  static constexpr bool kHasColumns = kSliced || kSharers > 1;  // a CTA does not work on all columns of V
  static constexpr int kSliceColumns = R.slice_columns();
  static constexpr int kHeadDim = R.head_dim, kValueDim = kSliceColumns, kM = R.block_m, kStages = R.stages;
  static constexpr int kConsumers = kM / kConsumerRows, kAllConsumers = kTeams * kConsumers;
  // CTAs that share a query tile: in each, one consumer computes S of its 64 rows. A K tile is loaded in
  // parts of its columns, of which each CTA multicasts half. More keys in a tile gain more than a second
  // stage, since a part is loaded again while the others are multiplied, and V is loaded while S is computed.
  // If V is K, the parts with the CTA's own columns are in V's stages, and no CTA multicasts.
  static constexpr bool kSharedValues = kSharesValues<KeyLoader>;
  static constexpr int kOwners = kConsumers / kSharers, kKeyParts = kSharers > 1 ? 4 : 1,
                       kLoadedParts = kSharedValues ? kKeyParts / 2 : kKeyParts,
                       kKeyCluster =
                           kSharers > 1 && !kInPages<KeyLoader> && !kSharedValues ? kCluster : kMulticast;
  static constexpr bool kWidens = kFloat8Pages<KeyLoader>;
  static constexpr int kThreads = R.warps * 32;
  static constexpr int kKeyStages = kSharers > 1 ? kLoadedParts : kStages,
                       kValueStages = kSharedValues ? kStages + 1 : kStages;
  // The bias needs one or two stages of tiles in addition to Q, K and V; key tiles are smaller if these do
  // not fit. Dropout needs whole Philox blocks.
  static constexpr bool kFloatBias = Kind == ScoreKind::kFloatBias,
                        kBias = Kind == ScoreKind::kBias || Kind == ScoreKind::kBiasMask ||
                                Kind == ScoreKind::kBiasDropout || kFloatBias;
  static constexpr int bias_stages(int n) {
    const int64_t room =
        hopper::kMaxSharedBytes - hopper::kStateBytes - hopper::forward_tile_bytes(R.with_tile(kM, n));
    return static_cast<int>(std::min<int64_t>(2, room / ((kFloatBias ? 4 : 2) * kM * n)));
  }
  static constexpr bool kSmallBiasTile = kBias && (R.block_n % 32 != 0 || bias_stages(R.block_n) < 1);
  static constexpr bool kDropout = Kind == ScoreKind::kGeneralDropout || Kind == ScoreKind::kDropout ||
                                   Kind == ScoreKind::kMaskDropout || Kind == ScoreKind::kBiasDropout;
  // If CTAs share the query tile, the general kernels would spill registers with more keys.
  static constexpr bool kSmallKeyTile =
      kSmallBiasTile || (kSharers > 1 && (Kind == ScoreKind::kGeneral || Kind == ScoreKind::kGeneralDropout));
  static constexpr int kN = kSmallKeyTile ? 64
                            : kDropout    ? R.block_n / kDropoutColumns * kDropoutColumns
                                          : R.block_n;
  // Tiles of 80 or 96 keys begin with the first key that a query tile sees, so that a window spans as few as
  // possible: d256 with a window of 512 gains 3 %. Tiles of 128 keys gain nothing, since windows begin beside
  // their borders. Segments and ranges have rules of their own.
  static constexpr bool kTilesBeginAtAnyKey = !kInPages<KeyLoader>;  // boxes of pages begin with pages
  static constexpr bool kBeginsAtFirstKey =
      Kind == ScoreKind::kPlain && kN % kConsumerRows != 0 && !kPacksHeads && kTilesBeginAtAnyKey;
  // Column tiles of S whose exponentials overlap P V. ptxas sinks nearly all of them below the wait for P V,
  // unless make_before() holds them. Three consumers or more keep the MUFU busy anyway.
  static constexpr bool kRanges = Kind == ScoreKind::kRanges, kListed = lists_tiles(Kind),
                        kPlainLoop = Kind == ScoreKind::kPlain || kRanges || kListed;
  static constexpr bool kHoldsExponentials = kPlainLoop || (Kind == ScoreKind::kSegments && kValueDim <= 128);
  static constexpr int kEarlyExponentials = !kHoldsExponentials || kValueDim > 128 ? kN / 8
                                            : kAllConsumers > 2                    ? 0
                                                                                   : kN * 3 / 64;
  // Q stays in registers, so that it is read from shared memory once per query tile instead of once per key
  // tile. At d80 to d128 this gains 1 to 2 %; other tiles have too few registers.
  static constexpr bool kQueryInRegisters = (kPlainLoop || Kind == ScoreKind::kSegments) && kHeadDim > 64 &&
                                            kHeadDim <= 128 && kAllConsumers <= 2 && R.block_n <= 128 &&
                                            !kWidens;
  static constexpr int kHeadSteps = kHeadDim / 16, kKeySteps = kN / 16;
  // Multiplies only the visible tail of a consumer's last key tile, where it is no longer than this.
  static constexpr int kTailKeys =
      kSharers == 1 &&
              (Kind == ScoreKind::kPlain || Kind == ScoreKind::kSegments || (kRanges && kHeadDim <= 64))
          ? 32
          : 0;
  template <int kRows, int kColumns>
  using Tile = SharedTile<T, kRows, kColumns, false, hopper::forward_panel(kColumns) / kChunk<T>>;
  using QTile = Tile<kConsumerRows, kHeadDim>;  // of a consumer
  template <int kColumns>
  using KeyTile =
      std::conditional_t<kGroupsRows<KeyLoader>, GroupedTile<T, kN, kColumns>, Tile<kN, kColumns>>;
  using KTile = KeyTile<kHeadDim / kKeyParts>;
  using VTile = KeyTile<kValueDim>;
  using S = Accumulator<1, kN / 8>;
  using O = Accumulator<1, kValueDim / 8>;
  using P = FragmentsA<T, 1, kKeySteps>;
  // A separate warp stores o, which is 1 to 2 % faster than stores by the consumers from registers.
  static constexpr bool kStoresByTma =
      kPlainLoop && kCluster == 1 && kTeams == 1 && hopper::forward_stores_by_tma(R);
  using OTile = SharedTile<T, kConsumerRows, kValueDim>;
  using Output = std::conditional_t<kStoresByTma, OutputBuffer<kConsumers, OTile>, NoOutputBuffer>;
  using PackedScore =
      std::conditional_t<Kind == ScoreKind::kPlain, PackedHeadsScore<S, hopper::plain_takes_drafts(R)>,
                         PackedHeadsGeneralScore<S>>;
  using UnscaledScore =
      std::conditional_t<kPacksHeads, PackedScore, HopperScore<Kind, S, kInPages<KeyLoader>>>;
  using Score = std::conditional_t<kWidens, WithKeyScales<UnscaledScore>, UnscaledScore>;
  static constexpr bool kGap = kTakesGaps<Score>;  // ranges or a mask may leave a gap between key tiles
  // Whether a kernel before this one finds the keys that segments or a mask leave to query tiles.
  static constexpr bool kTrims = Score::reads(Operand::kQSegmentIds) || Score::reads(Operand::kMask);
  using Softmax = typename Score::template Softmax<T>;
  using Input = typename Score::template Input<T, kN, bias_stages(kN), kConsumers>;
  using Loader = KeyLoader<ForwardSm90>;
  // Whether the load warp starts before the scheduler has prepared what the consumers need, which saves 2,000
  // cycles of a kernel's start. With three consumers ptxas would then allocate registers differently, and the
  // loop would be 2 to 5 % slower. Calls with multicast are too long for the start to matter.
  static constexpr bool kEarlyLoad = kConsumers <= 2 && kMulticast == 1;
  using RowsOfQueryTile = std::conditional_t<
      kRanges, RangesOfTile<kConsumers>,
      std::conditional_t<kListed, ListOfTile<kConsumers>,
                         std::conditional_t<kWidens, ScaledRowsOfTile<kGap>, RowsOfTile<kGap>>>>;
  using Stored =
      std::conditional_t<kWidens, StoredTiles<kN, kHeadDim, kValueDim, hopper::stored_stages(R), kStages>,
                         NoStoredTiles>;
  using Shared = ForwardShared<T, QTile, KTile, VTile, kKeyStages, kValueStages, kConsumers, kOwners,
                               kLoadedParts, kKeyCluster, Input, kMulticast, Output, RowsOfQueryTile,
                               std::conditional_t<kHasColumns, SliceOfTile, NoSliceOfTile>,
                               std::conditional_t<(kCluster > 1), TileMailbox, NoMailbox>,
                               std::conditional_t<(kSharers > 1), RowExchange<P>, NoRowExchange>, Stored>;
  // Arrivals at a tile state of all but the consumers.
  static constexpr uint32_t kStateReleases =
      Loader::kWarps * std::min<uint32_t>(Loader::kLanes, ptx::kWarpArrivals) +
      Input::kWarps * ptx::kWarpArrivals + kStoresByTma + (kWidens ? Stored::kArrivals : 0);
  struct Maps {
    CUtensorMap query;
    [[no_unique_address]] typename Output::Map out;
    typename Loader::Maps keys;
    typename Input::Map input;
  };
  static_assert(registers_suffice(kThreads, kAllConsumers, kWidens));
  static_assert(!kWidens || Kind == ScoreKind::kPlain || Kind == ScoreKind::kGeneral);  // WithKeyScales
  static_assert(kM == kConsumers * kConsumerRows && kAllConsumers + kWidens < R.warps / 4 && kN % 16 == 0);
  // With a boolean mask, both consumers have the same head, and a piece is a tile of the mask.
  static_assert(Kind != ScoreKind::kListedMask || (kConsumers == 2 && kN % kRowBlock == 0));
  static_assert(32 * (1 + Loader::kWarps + Input::kWarps + kStoresByTma) <= kTeamProducers<kTeams> &&
                (kTeams == 1 || kCluster == 1));
  // plan() uses the shared memory of the row's plain kernel as that of all its kernels.
  static_assert(sizeof(Shared) <= hopper::forward_tile_bytes(R.with_tile(kM, kN)) + Input::kBytes +
                                      hopper::kStateBytes + (kStoresByTma ? kConsumers * OTile::kBytes : 0) +
                                      (kWidens ? hopper::stored_tile_bytes(R) : 0));
  static_assert(kTeams * sizeof(Shared) <= hopper::kMaxSharedBytes);
};

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    forward_sm90(const __grid_constant__ Problem p, const __grid_constant__ typename C::Maps maps,
                 const __grid_constant__ PersistentTiles tiles,
                 const __grid_constant__ TileSegments segments) {
  using Shared = typename C::Shared;
  const int warpgroup = warpgroup_index();
  const int thread = static_cast<int>(threadIdx.x) % kTeamProducers<C::kTeams>, warp = thread / 32;
  const int team = team_of<C::kTeams, C::kConsumers>(warpgroup);
  // Computed in bytes, because nvcc 13.0 makes the elements of an array of these larger than sizeof.
  auto& shared = *reinterpret_cast<Shared*>(ptx::dynamic_shared_1024() + team * sizeof(Shared));
  if (warpgroup == 0 && thread == 0) shared.init(C::kStateReleases);
  __syncthreads();
  if constexpr (C::kCluster > 1) ptx::sync_cluster();
  if (warpgroup == 0) {
    ptx::give_registers<producer_registers(C::kAllConsumers, C::kWidens)>();
    if (thread == 0) SchedulerThread<C>{p, tiles, segments, shared}.run(team);
    if (1 <= warp && warp <= C::Loader::kWarps && thread % 32 < C::Loader::kLanes)
      LoadWarp<C>{p, maps, shared}.run();
    if constexpr (C::Input::kWarps > 0)
      if (warp == 1 + C::Loader::kWarps) typename C::Input::template SegmentWarp<Shared>{p, shared}.run();
    if constexpr (C::kStoresByTma)
      if (thread == 32 * (1 + C::Loader::kWarps + C::Input::kWarps)) StoreWarp<C>{p, maps, shared}.run();
  } else if (warpgroup <= C::kAllConsumers) {
    ptx::take_registers<consumer_registers(C::kAllConsumers, C::kWidens)>();
    Consumer<C>(p, shared, consumer_index<C::kConsumers>(warpgroup), team).run();
  } else if constexpr (C::kWidens) {
    ptx::give_registers<producer_registers(C::kAllConsumers, C::kWidens)>();
    WideningWarpgroup<C>{p, shared}.run();
  }
  // Before this, the other CTA must not arrive at, or load into, this CTA's memory.
  if constexpr (C::kCluster > 1) {
    __syncwarp();
    __syncthreads();
    ptx::sync_cluster();
  }
}

// Whether a kernel before this one makes the schedule, or finds what query tiles see, and clears the tile
// counter. Without a sequence none does the latter.
inline bool follows_kernel(const Problem& p, const TileGrid& grid) {
  return grid.schedule >= 0 || (p.batch > 0 && (grid.segments >= 0 || grid.ranges >= 0 || grid.lists >= 0));
}

template <class C>
cudaError_t launch_forward_sm90(const Problem& p, const LaunchPlan& plan, void* workspace,
                                cudaStream_t stream) {
  const TileGrid& grid = plan.queries;
  if (grid.blocks == 0) return cudaSuccess;
  typename C::Maps maps;
  const int32_t batch = p.packed() ? 1 : p.batch;
  constexpr int32_t kPanel = C::QTile::kPanel * 8;
  const cudaError_t e_query =
      C::kPacksHeads ? make_packed_query_map(maps.query, p, kPanel, kConsumerRows)
                     : make_tensor_map(maps.query, p, p.query,
                                       {p.head_dim, p.heads, p.q_rows, batch, kPanel, kConsumerRows});
  if (e_query != cudaSuccess) return e_query;
  if constexpr (C::kStoresByTma) {
    const MapShape rows{p.value_dim, p.heads, p.q_rows, batch, C::OTile::kPanel * 8, kConsumerRows};
    if (cudaError_t e = make_tensor_map(maps.out, p, p.out, rows); e != cudaSuccess) return e;
  }
  const TileSegments segments = tile_segments(p, grid, workspace);
  cudaError_t e_keys;
  if constexpr (C::kListed) {
    e_keys = C::Loader::make_maps(maps.keys, p, segments.lists.keys);
  } else {
    e_keys = C::Loader::make_maps(maps.keys, p);
  }
  if (e_keys != cudaSuccess) return e_keys;
  if (cudaError_t e = C::Input::make_map(maps.input, p); e != cudaSuccess) return e;
  const int64_t heads = grid.blocks / grid.tiles, cluster_tiles = ceil_div(grid.tiles, C::kMulticast);
  PersistentTiles tiles{schedule_of(grid, workspace), static_cast<int32_t>(cluster_tiles),
                        static_cast<uint32_t>(heads * cluster_tiles), tile_counter(plan, workspace),
                        heads_together(p, static_cast<uint32_t>(heads))};
  const bool early = follows_kernel(p, grid);
  if (!early && tiles.counter)
    if (cudaError_t e = cudaMemsetAsync(tiles.counter, 0, sizeof(uint32_t), stream); e != cudaSuccess)
      return e;
  return launch_early(early, forward_sm90<C>, C::kCluster, plan.persistent_ctas, C::kThreads,
                      C::kTeams * sizeof(typename C::Shared), stream, p, maps, tiles, segments);
}

template <class T, Row R>
cudaError_t launch_row(const Problem& p, const LaunchPlan& plan, void* workspace, cudaStream_t stream) {
  const auto run = [&]<ScoreKind kKind, template <class> class Loader, int kMulticast>() {
    return launch_forward_sm90<ForwardSm90<T, R, kKind, Loader, kMulticast>>(p, plan, workspace, stream);
  };
  if constexpr (R.multicast > 1) {
    if (plan.cluster_size > 1) return run.template operator()<ScoreKind::kPlain, DenseLoader, R.multicast>();
  }
  if constexpr (R.design == Design::kPackedHeads) {
    const Problem packed = pack_heads(p);
    const auto launch = [&]<ScoreKind kKind>() {
      using C = std::conditional_t<hopper::widens(R), ForwardSm90<T, R, kKind, Float8PagesLoader>,
                                   std::conditional_t<R.is_paged(), ForwardSm90<T, R, kKind, PagedLoader>,
                                                      ForwardSm90<T, R, kKind, DenseLoader>>>;
      return launch_forward_sm90<C>(packed, plan, workspace, stream);
    };
    if constexpr (R.takes(ScoreKind::kGeneral))
      if (!hopper::takes_plain_packed_heads(R, p.spec))
        return launch.template operator()<ScoreKind::kGeneral>();
    return launch.template operator()<ScoreKind::kPlain>();
  } else {
    return launch_score<R>(plan.score, [&]<ScoreKind kKind>() {
      if constexpr (hopper::widens(R)) {
        return run.template operator()<kKind, Float8PagesLoader, 1>();
      } else if constexpr (R.is_paged()) {
        if constexpr (kKind == ScoreKind::kPlain && R.head_dim > 64 && R.head_dim <= 256) {
          const bool exact = p.head_dim == R.head_dim && p.value_dim == R.value_dim;
          if (exact && has_page_map(p, p.key, p.head_dim) && has_page_map(p, p.value, p.value_dim))
            return run.template operator()<kKind, PagedRowsLoader, 1>();
        }
        return run.template operator()<kKind, PagedLoader, 1>();
      } else if constexpr (lists_tiles(kKind)) {
        return run.template operator()<kKind, ListLoader, 1>();
      } else {
        if constexpr (R.design == Design::kClusterColumns) {
          if constexpr (kKind == ScoreKind::kPlain)
            if (p.spec.shared_kv()) return run.template operator()<kKind, SharedColumnsLoader, 1>();
          return run.template operator()<kKind, ColumnsLoader, 1>();
        } else {
          return run.template operator()<kKind, DenseLoader, 1>();
        }
      }
    });
  }
}

}  // namespace jax_flash
