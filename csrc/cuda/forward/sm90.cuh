// The forward for sm_90a: TMA, mbarrier, wgmma, warp specialisation. FlashAttention-3 (Shah et al., 2024).
//
// One block per multiprocessor takes tile after tile. Of the first warpgroup, the producers, one thread (of
// each team) finds the tiles' work and one has Q, K and V copied; every other warpgroup, a consumer, owns 64
// rows of a tile. In a consumer S of a tile of keys is made beside P V of the tile before it.
// docs/hopper-forward.md draws it.
#pragma once

#include <algorithm>
#include <type_traits>

#include "core/plan.h"
#include "cuda/block_state.cuh"
#include "cuda/epilogue.cuh"
#include "cuda/forward/sm90_beside.cuh"
#include "cuda/forward/sm90_consumer.cuh"
#include "cuda/forward/sm90_load.cuh"
#include "cuda/launch.h"
#include "cuda/mask.cuh"
#include "cuda/ptx/registers.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/registry.h"
#include "cuda/score.cuh"
#include "cuda/segments.cuh"
#include "cuda/single_score.cuh"
#include "cuda/softmax.cuh"
#include "cuda/tile/descriptor.cuh"
#include "cuda/tile/operands.cuh"

namespace jax_flash {

// A row of csrc/kernels.def: Warps are those of the producers and of M / 64 consumers for each of the Teams,
// and where there is one consumer of a warpgroup that only keeps the registers dealt out as to two. Teams
// have tiles, keys and values of their own: one begins and ends while another is in between. Of a Cluster
// each block has a tile of queries of its own, and what is copied of K and V is copied to all.
template <class T, int HeadDim, int ValueDim, int M, int N, int Stages, int Warps, int Teams, ScoreKind Kind,
          template <class> class KeySource = DenseKeys, int Cluster = 1>
struct ForwardSm90 {
  using Element = T;
  static constexpr int kCluster = Cluster;
  static constexpr ScoreKind kKind = Kind;
  static constexpr bool kGeneral = Kind == ScoreKind::kGeneral || Kind == ScoreKind::kDropout;
  static constexpr bool kDropout = Kind == ScoreKind::kDropout || Kind == ScoreKind::kDropoutAlone;
  // Scores come to the softmax as powers of two.
  static constexpr bool kScaled = kGeneral || Kind == ScoreKind::kAlibi || Kind == ScoreKind::kSoftcap;
  // Softcap's scores are bounded: no maximum need be known where P has float32's range.
  static constexpr bool kBounded = Kind == ScoreKind::kSoftcap && std::is_same_v<T, __nv_bfloat16>;
  // Dropout's numbers are drawn beside the softmax, not beside the products.
  static constexpr bool kDrawsLate = Kind == ScoreKind::kDropoutAlone;
  // What a kind needs beside the tiles of keys has to fit: those of a bias in shared memory; where they do
  // not there are fewer keys in a tile. Dropout wants whole blocks of its numbers.
  static constexpr int kRowBytes = 2 * (M * HeadDim + Stages * N * (HeadDim + ValueDim));
  static constexpr int kBiasStages =
      std::min<int>(2, (kHopperSharedBytes - kHopperStateBytes - kRowBytes) / (2 * M * N));
  static constexpr bool kSmaller = Kind == ScoreKind::kBias && (N % 32 != 0 || kBiasStages < 1);
  static constexpr int kTeams = Teams, kConsumers = M / kConsumerRows, kAllConsumers = kTeams * kConsumers;
  static constexpr int kThreads = Warps * 32, kTeamProducers = 128 / kTeams;  // threads
  static constexpr int kM = M, kStages = Stages;
  static constexpr int kN = kSmaller ? 64 : kDropout ? N / kDropoutColumns * kDropoutColumns : N;
  // Column tiles of S whose exponentials are made beside P V: left alone the assembler has nearly all of them
  // made after it, unless it is kept from it. Three consumers or more fill the exponential unit anyway.
  static constexpr bool kPaced =
      Kind == ScoreKind::kPlain || (Kind == ScoreKind::kSegments && ValueDim <= 128);
  static constexpr int kEarly = !kPaced || ValueDim > 128 ? kN / 8 : kAllConsumers > 2 ? 0 : kN * 3 / 64;
  // Read from shared memory once a tile instead of at every step: 2 % where power is the limit.
  static constexpr bool kQueryInRegisters =
      Kind == ScoreKind::kPlain && HeadDim == 128 && kAllConsumers <= 2 && N <= kHopperKeys;
  // Of a consumer's last tile of keys no more are multiplied where its rows see no more.
  static constexpr int kFew = Kind == ScoreKind::kPlain ? 32 : 0;
  static constexpr int kHeadSteps = HeadDim / 16, kKeySteps = kN / 16;
  // Of a thread: what the consumers need, and little for the producer.
  static constexpr int kConsumerRegisters = kAllConsumers <= 2 ? 232 : kAllConsumers == 3 ? 160 : 112;
  static constexpr int kProducerRegisters = kAllConsumers <= 2 ? 40 : 32;
  // All of them are dealt out of what the block was launched with; setmaxnreg waits for what there is not.
  static_assert(128 * (kProducerRegisters + (Warps / 4 - 1) * kConsumerRegisters) <=
                kThreads * (65536 / kThreads / 8 * 8));
  using QTile = SharedTile<T, kConsumerRows, HeadDim>;  // of a consumer
  using KTile = SharedTile<T, kN, HeadDim>;
  using VTile = SharedTile<T, kN, ValueDim>;
  using S = Accumulator<1, kN / 8>;
  using O = Accumulator<1, ValueDim / 8>;
  using P = FragmentsA<T, 1, kKeySteps>;
  // Where scores that may lie anywhere are left to the softmax as they are.
  static constexpr bool kFar = Kind == ScoreKind::kPlain || Kind == ScoreKind::kSegments ||
                               Kind == ScoreKind::kDropoutAlone || Kind == ScoreKind::kBias;
  using Softmax = std::conditional_t<kFar, FarSoftmax<S::kSlots, float>, OnlineSoftmax<S::kSlots>>;
  using Keys = KeySource<ForwardSm90>;
  using Beside = typename BesideOf<Kind, T, kN, kSmaller ? 2 : kBiasStages, kConsumers>::type;
  // The loader begins before the finder has found all that a tile of queries needs: 2,000 cycles of a
  // kernel's start. Not of three consumers, whose loop is 2 to 5 % slower then, for want of registers, nor of
  // pairs of blocks, which work too long for it to show.
  static constexpr bool kInParts = kConsumers <= 2 && Cluster == 1 && !Beside::kNarrows;
  using Shared = ForwardShared<T, QTile, KTile, VTile, Stages, kConsumers, Beside, kCluster>;
  // Arrivals of the producers at a tile's state.
  static constexpr uint32_t kStateLeft = Keys::kWarps * std::min<uint32_t>(Keys::kLanes, ptx::kWarpArrivals) +
                                         Beside::kWarps * ptx::kWarpArrivals;
  static constexpr uint32_t kStateFilled = Beside::kNarrows ? ptx::kWarpArrivals : 1;
  struct Maps {
    typename Keys::Maps keys;
    typename Beside::Map beside;
  };
  static constexpr bool holds(ScoreKind kind) { return hopper_holds(kind, HeadDim, N, kConsumers, kTeams); }
  static constexpr bool kPairs = hopper_pairs(HeadDim, N);  // it is built in clusters of two as well
  static_assert(M == kConsumers * kConsumerRows && kAllConsumers < Warps / 4 && kN % 16 == 0);
  static_assert(32 * (1 + Keys::kWarps + Beside::kWarps) <= kTeamProducers && (kTeams == 1 || kCluster == 1));
  static_assert(sizeof(Shared) <= kConsumers * QTile::kBytes + Stages * (KTile::kBytes + VTile::kBytes) +
                                      Beside::kBytes + kHopperStateBytes);
  static_assert(kTeams * sizeof(Shared) <= kHopperSharedBytes);
};

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    forward_sm90(const __grid_constant__ Problem p, const __grid_constant__ typename C::Maps maps,
                 const __grid_constant__ ForwardTiles tiles) {
  const int group = uniform(static_cast<int>(threadIdx.x) / 128);
  const int thread = static_cast<int>(threadIdx.x) % C::kTeamProducers, warp = thread / 32;
  const int team = C::kTeams == 1 ? 0
                   : group == 0   ? uniform(static_cast<int>(threadIdx.x) / C::kTeamProducers)
                                  : (group - 1) / C::kConsumers;
  // In bytes: to nvcc 13.0 the elements of an array of these are larger than sizeof.
  auto& shared =
      *reinterpret_cast<typename C::Shared*>(ptx::dynamic_shared_1024() + team * sizeof(typename C::Shared));
  if (group == 0 && thread == 0) shared.init(C::kStateLeft, C::kStateFilled);
  __syncthreads();
  if constexpr (C::kCluster > 1) ptx::sync_cluster();
  if (group == 0) {
    ptx::give_registers<C::kProducerRegisters>();
    if (thread == 0) Finder<C>{p, tiles, shared}.run(team);
    if (1 <= warp && warp <= C::Keys::kWarps && thread % 32 < C::Keys::kLanes)
      Loader<C>{p, maps, shared}.run();
    if constexpr (C::Beside::kWarps > 0)
      if (warp == 1 + C::Keys::kWarps)
        typename C::Beside::template Finder<typename C::Shared>{p, shared}.run();
    if constexpr (C::Beside::kNarrows)
      if (warp == 2 + C::Keys::kWarps)
        typename C::Beside::template Narrower<typename C::Shared>{p, shared}.run();
  } else if (group <= C::kAllConsumers) {
    ptx::take_registers<C::kConsumerRegisters>();
    Consumer<C>(p, shared, (group - 1) % C::kConsumers, team).run();
  }
  if constexpr (C::kCluster > 1) {  // whose blocks arrive at, and copy to, each other's memory
    __syncwarp();
    __syncthreads();
    ptx::sync_cluster();
  }
}

template <class C>
cudaError_t launch_forward_sm90(const Problem& p, const LaunchPlan& plan, void* workspace,
                                cudaStream_t stream) {
  const TileGrid& grid = plan.queries;
  if (grid.blocks == 0) return cudaSuccess;
  typename C::Maps maps;
  if (cudaError_t e = C::Keys::make_maps(maps.keys, p); e != cudaSuccess) return e;
  if (cudaError_t e = C::Beside::make_map(maps.beside, p); e != cudaSuccess) return e;
  const int64_t heads = grid.blocks / grid.tiles, of_clusters = ceil_div(grid.tiles, C::kCluster);
  ForwardTiles tiles{schedule_of(grid, workspace), static_cast<int32_t>(of_clusters),
                     static_cast<uint32_t>(heads * of_clusters), nullptr,
                     heads_together(p, static_cast<uint32_t>(heads))};
  if (plan.tile_counter >= 0) {
    tiles.counter = reinterpret_cast<uint32_t*>(static_cast<char*>(workspace) + plan.tile_counter);
    if (cudaError_t e = cudaMemsetAsync(tiles.counter, 0, sizeof(uint32_t), stream); e != cudaSuccess)
      return e;
  }
  return launch_clusters(forward_sm90<C>, C::kCluster, plan.persistent_ctas, C::kThreads,
                         C::kTeams * sizeof(typename C::Shared), stream, p, maps, tiles);
}

}  // namespace jax_flash

// The launch function of one row and dtype, for csrc/cuda/registry.h.
#define JF_LAUNCH_FORWARD(kind, dtype, ...) \
  launch_forward_sm90<ForwardSm90<dtype, __VA_ARGS__, ScoreKind::kind>>(p, plan, workspace, stream)
#define JF_CASE(kind, dtype, ...)                                                                    \
  case ScoreKind::kind:                                                                              \
    if constexpr (Plain::holds(ScoreKind::kind)) return JF_LAUNCH_FORWARD(kind, dtype, __VA_ARGS__); \
    break;
#define JF_DEFINE_LAUNCH(name, dtype, ...)                                                           \
  namespace jax_flash {                                                                              \
  cudaError_t name(const Problem& p, const LaunchPlan& plan, void* workspace, cudaStream_t stream) { \
    using Plain = ForwardSm90<dtype, __VA_ARGS__, ScoreKind::kPlain>;                                \
    if constexpr (Plain::kPairs) {                                                                   \
      using Paired = ForwardSm90<dtype, __VA_ARGS__, ScoreKind::kPlain, DenseKeys, 2>;               \
      if (plan.cluster_size > 1) return launch_forward_sm90<Paired>(p, plan, workspace, stream);                \
    }                                                                                                \
    switch (plan.score) {                                                                            \
      JF_CASE(kPlain, dtype, __VA_ARGS__)                                                            \
      JF_CASE(kGeneral, dtype, __VA_ARGS__)                                                          \
      JF_CASE(kDropout, dtype, __VA_ARGS__)                                                          \
      JF_CASE(kDropoutAlone, dtype, __VA_ARGS__)                                                     \
      JF_CASE(kSegments, dtype, __VA_ARGS__)                                                         \
      JF_CASE(kAlibi, dtype, __VA_ARGS__)                                                            \
      JF_CASE(kSoftcap, dtype, __VA_ARGS__)                                                          \
      JF_CASE(kBias, dtype, __VA_ARGS__)                                                             \
    }                                                                                                \
    return cudaErrorNotSupported;                                                                    \
  }                                                                                                  \
  }
