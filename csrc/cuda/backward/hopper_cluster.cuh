// The backward for sm_90a and large head dims, in clusters of two CTAs.
#pragma once

#include "core/families/hopper_layout.h"
#include "core/plan/launch_plan.h"
#include "cuda/backward/convert.cuh"
#include "cuda/backward/hopper_cluster_consumer.cuh"
#include "cuda/backward/hopper_cluster_load.cuh"
#include "cuda/backward/hopper_cluster_state.cuh"
#include "cuda/hopper/roles.cuh"
#include "cuda/launch.h"
#include "cuda/registry.h"
#include "cuda/tensor_map.h"

namespace jax_flash {

#ifndef DQREGS
#define DQREGS (C::kDqColumns <= 64 ? 64 : 96)
#endif
#ifndef CREGS
#define CREGS (C::kDqColumns <= 64 ? 208 : 184)
#endif
#ifndef PREGS
#define PREGS 32
#endif

template <class T, int HeadDim, int ValueDim, int M, int N, int Stages, int Warps>
struct BackwardClusterSm90 {
  using Element = T;
  static constexpr int kCluster = 2, kConsumers = 3, kThreads = Warps * 32;
  static constexpr int kM = M, kN = N, kStages = Stages, kDsStages = 2;
  static constexpr int kDoStages = HeadDim > 192 ? 3 : 4;
  using KHalf = SharedTile<T, kConsumerRows, HeadDim / 2>;
  using VHalf = SharedTile<T, kConsumerRows, ValueDim / 2>;
  using QHalf = SharedTile<T, M, HeadDim / 2>;
  using DoHalf = SharedTile<T, M, ValueDim / 2>;
  using DsTile = SharedTile<T, N, M>;
  using S = Accumulator<1, M / 8>;
  using Fragments = FragmentsA<T, 1, M / 16>;
  using DKHalf = Accumulator<1, HeadDim / 16>;
  using DVHalf = Accumulator<1, ValueDim / 16>;
  // Columns of dQ at a time: registers are few.
  static constexpr int kDqColumns = HeadDim > 192 ? HeadDim / 4 : HeadDim / 2;
  using DQ = Accumulator<1, kDqColumns / 8>;
  using Shared = BackwardClusterShared<BackwardClusterSm90>;
  struct Maps {
    CUtensorMap query, dout, key, value;
    float* accumulator;
  };
  static_assert(N == kCluster * kConsumerRows && M == kConsumerRows && kThreads == 4 * kWarpgroup);
  static_assert(sizeof(Shared) <= hopper::kMaxSharedBytes);
};

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    backward_cluster_sm90(const __grid_constant__ Problem p, const __grid_constant__ typename C::Maps maps,
                          const __grid_constant__ PersistentTiles tiles) {
  using Shared = typename C::Shared;
  auto& shared = *reinterpret_cast<Shared*>(ptx::dynamic_shared_1024());
  const int warpgroup = warpgroup_index(), warp = static_cast<int>(threadIdx.x) / 32;
  if (threadIdx.x == 0) shared.init();
  __syncthreads();
  ptx::sync_cluster();
  if (warpgroup == 0) {
    ptx::give_registers<PREGS>();
    ClusterGradientProducer<C> producer{{p, maps, shared}};
    const bool leads = threadIdx.x % 32 == 0;
#ifndef NOP0
    if (warp == 0 && leads) producer.schedule(tiles);
#endif
#ifndef NOP1
    if (warp == 1 && leads) producer.load_queries();
#endif
#ifndef NOP2
    if (warp == 2) producer.load_statistics();
#endif
#ifndef NOP3
    if (warp == 3 && leads) producer.load_douts();
#endif
  } else if (warpgroup == 1) {
    ptx::take_registers<CREGS>();
#ifndef NO1
    ScoreConsumer<C>(p, shared).run();
#endif
  } else if (warpgroup == 2) {
    ptx::take_registers<CREGS>();
#ifndef NO2
    ScoreGradientConsumer<C>(p, shared).run();
#endif
  } else {
    ptx::give_registers<DQREGS>();
#ifndef NO3
    QueryGradientConsumer<C>(p, shared).run(maps.accumulator);
#endif
  }
  __syncwarp();
  __syncthreads();
  ptx::sync_cluster();
}

template <class C>
cudaError_t make_cluster_maps(typename C::Maps& maps, const Problem& p) {
  const int32_t batch = p.packed() ? 1 : p.batch, rows = C::kM / C::kCluster;
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

inline uint32_t cluster_heads_together(const Problem& p) {
  constexpr int64_t kBytes = 32 << 20, kMost = 16, kFewestOfBand = 8;
  const bool band = p.spec.left >= 0 || p.spec.right >= 0;
  const int64_t row = 2 * (p.head_dim + p.value_dim) + 4 * p.head_dim;
  const int64_t head = std::max<int64_t>(1, row * p.q_rows * (p.heads / p.kv_heads));
  return static_cast<uint32_t>(std::clamp<int64_t>(kBytes / head, band ? kFewestOfBand : 1, kMost));
}

template <class C, class T>
cudaError_t launch_backward_cluster_sm90(const Problem& p, const LaunchPlan& plan, void* workspace,
                                         cudaStream_t stream) {
  auto* accumulator = reinterpret_cast<float*>(static_cast<char*>(workspace) + plan.accumulator);
  if (cudaError_t e = clear_accumulator(p, accumulator, stream); e != cudaSuccess) return e;
  const TileGrid& grid = plan.keys;
  if (grid.blocks > 0) {
    typename C::Maps maps;
    maps.accumulator = accumulator;
    if (cudaError_t e = make_cluster_maps<C>(maps, p); e != cudaSuccess) return e;
    PersistentTiles tiles{schedule_of(grid, workspace), static_cast<int32_t>(grid.tiles),
                          static_cast<uint32_t>(grid.blocks), nullptr, cluster_heads_together(p)};
    if (cudaError_t e = clear_tile_counter(tiles, plan, workspace, stream); e != cudaSuccess) return e;
    const cudaError_t e =
        launch_clusters(backward_cluster_sm90<C>, C::kCluster, plan.persistent_ctas, C::kThreads,
                        sizeof(typename C::Shared), stream, p, maps, tiles);
    if (e != cudaSuccess) return e;
  }
  return convert_accumulator<T>(p, accumulator, stream);
}

}  // namespace jax_flash
