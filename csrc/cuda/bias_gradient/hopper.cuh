// The bias gradient for sm_90a, for a dbias with a row for each query and a column for each key: dS summed
// over the batch entries and heads that share the bias.
//
// The grid is persistent. A CTA works on tiles [M, N] of dbias; a step is one of the batch entries and heads
// that a tile sums over. No two CTAs write the same element, so the order of sums is fixed.
//
//   producer warpgroup                      consumer warpgroups, 64 query rows each
//
//   warp 0, a thread: tile numbers          sum = 0; for steps:
//   warp 1, a thread: pairs of tiles          S = Q Kᵀ, dP = dO Vᵀ
//     by TMA, Q with K and dO with V          P = exp(S + bias − lse), dS = P ∘ (dP − delta)
//   warp 2: bias, once a tile, or with        sum += dS
//     other options bias, mask and the      the sum is stored
//     options' operands, at each step
//   warp 3: lse and delta
//
// Up to kStages pairs are in flight, of 64 columns each. Consumers alternate in issuing their products, so
// that the exponentials of one overlap the products of the other.
#pragma once

#include "core/families/hopper_layout.h"
#include "core/plan/launch_plan.h"
#include "cuda/bias_gradient/batch_parts.cuh"
#include "cuda/bias_gradient/hopper_consumer.cuh"
#include "cuda/bias_gradient/hopper_load.cuh"
#include "cuda/hopper/pipeline.cuh"
#include "cuda/hopper/roles.cuh"
#include "cuda/launch.h"
#include "cuda/leading_slices.h"
#include "cuda/ptx/registers.cuh"
#include "cuda/registry.h"
#include "cuda/score/hopper_gradient.cuh"
#include "cuda/tensor_map.h"

namespace jax_flash {

// A row of csrc/kernels.def.
template <class T, Row R, ScoreKind Kind>
struct BiasGradientSm90 {
  using Element = T;
  static constexpr ScoreKind kKind = Kind;
  static constexpr bool kGeneral = Kind == ScoreKind::kGeneralDropout;  // this kind has a mask, too
  // Whether a band that all batch entries share is found once a tile, as each entry's keys are looked up.
  // With dropout it would spill.
  static constexpr bool kKeepsBand = Kind == ScoreKind::kBiasMask;
  static constexpr int kHeadDim = R.head_dim;
  static constexpr int kM = R.block_m, kN = R.block_n, kThreads = R.warps * 32;
  static constexpr int kConsumers = kM / kConsumerRows;
  static constexpr int kNumbers = 2, kRowStages = 2;  // stages of tile numbers; of lse and delta
  // The columns of Q and K, and of dO and V, are loaded in parts of 64.
  static constexpr int kParts = kHeadDim / 64, kStages = R.stages;
  static_assert(kHeadDim == R.value_dim && kHeadDim % 64 == 0);
  using Rows = SharedTile<T, kM, 64>;  // of Q or dO
  using Keys = SharedTile<T, kN, 64>;  // of K or V
  using S = Accumulator<1, kN / 8>;
  using Score = GradientScore<Kind, S>;
  // Whether the mask is read as bits (MaskWords).
  static constexpr bool kReadsMask = Score::reads(Operand::kMask) && !stages_mask(Kind);
  using Tiles =
      GradientTiles<Kind, T, kM, kN,
                    static_cast<int>(hopper::kMaxSharedBytes) - kStages*(Rows::kBytes + Keys::kBytes)>;
  struct Maps {
    CUtensorMap query, key, dout, value;
  };
  // Tiles of dbias.
  struct Grid {
    uint32_t count;
    int32_t rows, columns;     // tiles of a head
    const Interval* segments;  // visible keys of each query tile of a batch entry, or null
    MaskWords words;
    uint32_t* counter;
    bool in_floats;  // dbias is float32: the sum of a part of the batch
  };
  struct Shared {
    // A part of Q followed by that of K, or of dO followed by that of V.
    alignas(1024) uint8_t pairs[kStages][Rows::kBytes + Keys::kBytes];
    typename Tiles::Buffer score_tiles;
    QueryStatistics<kM> statistics[kRowStages];
    // The score operands of a step; they arrive with its tiles.
    ScoreOperands operands[kGeneral ? Tiles::kStages : 1];
    uint32_t numbers[kNumbers];
    Pipeline<kNumbers> number_pipe;
    Pipeline<kStages> pair_pipe;
    Pipeline<kRowStages> row_pipe;  // lse and delta
    typename Tiles::Pipe score_pipe;

    __device__ __forceinline__ void init() {
      constexpr uint32_t kWarps = kConsumers * kConsumerWarps * ptx::kWarpArrivals;
      number_pipe.init(kWarps + 2 * ptx::kWarpArrivals + 1);
      pair_pipe.init(kWarps);
      row_pipe.init(kWarps, ptx::kWarpArrivals);
      score_pipe.init(kWarps);
      ptx::fence_barriers();
    }
  };
  // Each producer walks through batch entries and heads, which takes more than the usual 40 registers.
  static constexpr int kConsumerRegisters = 224, kProducerRegisters = 56;
  static_assert(kThreads == 3 * kWarpgroup && kConsumers == 2);
  static_assert(kProducerRegisters + 2 * kConsumerRegisters <= 65536 / kThreads / 8 * 8 * 3);
  static_assert(sizeof(Shared) <= hopper::kMaxSharedBytes);
  static_assert(Tiles::kStages == (stages_float_bias(Kind) ? 1 : 2));
};
template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    bias_gradient_sm90(const __grid_constant__ Problem p, const __grid_constant__ typename C::Maps maps,
                       const __grid_constant__ typename C::Grid grid) {
  auto& shared = *reinterpret_cast<typename C::Shared*>(ptx::dynamic_shared_1024());
  const int warpgroup = warpgroup_index(), warp = static_cast<int>(threadIdx.x) / 32;
  if (threadIdx.x == 0) shared.init();
  __syncthreads();
  if (warpgroup == 0) {
    ptx::give_registers<C::kProducerRegisters>();
    BiasProducer<C> producer{{p, shared, grid}, maps};
    const bool leads = threadIdx.x % 32 == 0;
    if (warp == 0 && leads) producer.number_tiles();
    if (warp == 1 && leads) producer.load_pairs();
    if (warp == 2) producer.load_bias();
    if (warp == 3) producer.load_statistics();
  } else {
    ptx::take_registers<C::kConsumerRegisters>();
    BiasConsumer<C>{{p, shared, grid}, warpgroup - 1}.run();
  }
}

template <class C>
cudaError_t launch_bias_gradient_sm90(const Problem& call, const LaunchPlan& plan, void* workspace,
                                      cudaStream_t stream) {
  const Problem p = with_batch_parts(call, plan, workspace);
  typename C::Maps maps;
  const struct {
    CUtensorMap& map;
    const View& view;
    MapShape shape;
  } all[] = {
      {maps.query, p.query, {p.head_dim, p.heads, p.q_rows, p.batch, C::Rows::kPanel * 8, C::kM}},
      {maps.dout, p.dout, {p.value_dim, p.heads, p.q_rows, p.batch, C::Rows::kPanel * 8, C::kM}},
      {maps.key, p.key, {p.head_dim, p.kv_heads, p.k_rows, p.batch, C::Keys::kPanel * 8, C::kN}},
      {maps.value, p.value, {p.value_dim, p.kv_heads, p.k_rows, p.batch, C::Keys::kPanel * 8, C::kN}},
  };
  for (const auto& [map, view, shape] : all) {
    if (cudaError_t e = make_tensor_map(map, p, view, shape); e != cudaSuccess) return e;
  }
  auto* const counter = reinterpret_cast<uint32_t*>(static_cast<char*>(workspace) + plan.tile_counter);
  if (cudaError_t e = cudaMemsetAsync(counter, 0, sizeof(uint32_t), stream); e != cudaSuccess) return e;
  const auto rows = static_cast<int32_t>(plan.queries.tiles), columns = static_cast<int32_t>(plan.keys.tiles);
  const typename C::Grid grid{static_cast<uint32_t>(plan.queries.blocks),
                              rows,
                              columns,
                              segments_of(plan.queries, workspace),
                              mask_words(p, plan.queries, workspace),
                              counter,
                              plan.parts > 1};
  const cudaError_t e = launch(bias_gradient_sm90<C>, plan.persistent_ctas, C::kThreads,
                               sizeof(typename C::Shared), stream, p, maps, grid);
  return e == cudaSuccess ? add_batch_parts(call, plan, workspace, stream) : e;
}

template <class T, Row R>
cudaError_t launch_row(const Problem& p, const LaunchPlan& plan, void* workspace, cudaStream_t stream) {
  const auto launch = [&](const Problem& slice, const LaunchPlan& of_slice) {
    return launch_score<R>(plan.score, [&]<ScoreKind kKind>() {
      return launch_bias_gradient_sm90<BiasGradientSm90<T, R, kKind>>(slice, of_slice, workspace, stream);
    });
  };
  return launch_slices(p, plan, &LaunchPlan::queries, workspace, stream, launch);
}

}  // namespace jax_flash