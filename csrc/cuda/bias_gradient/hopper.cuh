// The bias gradient for sm_90a, where dbias has a row for each query and a column for each key: dS summed
// over the batch entries and heads that share the bias.
//
// The grid is persistent. A CTA works on tiles [M, N] of dbias; a step is one of the batch entries and heads
// that a tile sums over. No two CTAs write the same element, so sums have an order.
//
//   producer warpgroup                      consumer warpgroups, 64 query rows each
//
//   warp 0, a thread: tile numbers          sum = 0; for steps:
//   warp 1, a thread: Q and K, dO and V       S = Q Kᵀ, dP = dO Vᵀ
//     by TMA, kStages pairs                   P = exp(S + bias − lse), dS = P ∘ (dP − delta)
//   warp 2: bias, once a tile                 sum += dS
//                                           the sum is stored
#pragma once

#include <algorithm>

#include "core/families/hopper_layout.h"
#include "core/plan/launch_plan.h"
#include "cuda/bias_gradient/bias_tile.cuh"
#include "cuda/gradient.cuh"
#include "cuda/hopper/pipeline.cuh"
#include "cuda/hopper/roles.cuh"
#include "cuda/hopper/tma.cuh"
#include "cuda/launch.h"
#include "cuda/leading_slices.h"
#include "cuda/ptx/registers.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/registry.h"
#include "cuda/score/hopper_gradient.cuh"
#include "cuda/tensor_map.h"
#include "cuda/tile/descriptor.cuh"
#include "cuda/tile/operands.cuh"

namespace jax_flash {

// A row of csrc/kernels.def.
template <class T, int HeadDim, int ValueDim, int M, int N, int Stages, int Warps, ScoreKind Kind>
struct BiasGradientSm90 {
  using Element = T;
  static constexpr int kM = M, kN = N, kStages = Stages, kThreads = Warps * 32;
  static constexpr int kConsumers = M / kConsumerRows, kNumbers = 2;
  using QTile = SharedTile<T, M, HeadDim>;
  using KTile = SharedTile<T, N, HeadDim>;
  using DoTile = SharedTile<T, M, ValueDim>;
  using VTile = SharedTile<T, N, ValueDim>;
  static constexpr int kPairBytes =
      std::max<int>(QTile::kBytes + KTile::kBytes, DoTile::kBytes + VTile::kBytes);
  using S = Accumulator<1, N / 8>;
  using Score = GradientScore<Kind, S>;
  using Tiles = GradientTiles<Kind, T, M, N, 0>;
  struct Maps {
    CUtensorMap query, key, dout, value;
  };
  // Tiles of dbias.
  struct Grid {
    uint32_t count;
    int32_t rows, columns;  // of a head
    uint32_t* counter;
  };
  struct Shared {
    alignas(1024) uint8_t pairs[kStages][kPairBytes];  // Q over K, or dO over V
    typename Tiles::Buffer score_tiles;
    uint32_t numbers[kNumbers];
    Pipeline<kNumbers> number_pipe;
    Pipeline<kStages> pair_pipe;
    typename Tiles::Pipe score_pipe;

    __device__ __forceinline__ void init() {
      constexpr uint32_t kWarps = kConsumers * kConsumerWarps * ptx::kWarpArrivals;
      number_pipe.init(kWarps + ptx::kWarpArrivals + 1);
      pair_pipe.init(kWarps);
      score_pipe.init(kWarps);
      ptx::fence_barriers();
    }
  };
  static_assert(kThreads == (1 + kConsumers) * kWarpgroup && registers_suffice(kThreads, kConsumers));
  static_assert(sizeof(Shared) <= hopper::bias_gradient_shared_bytes(HeadDim, ValueDim, M, N, Stages));
};

// One batch entry and head of a tile of dbias.
struct BiasStep {
  BlockWork work;
  Band band;
};

// What every role walks through.
template <class C>
struct BiasRole {
  using Grid = typename C::Grid;
  const Problem& p;
  typename C::Shared& shared;
  const Grid& grid;
  uint32_t tile_index = 0, step_use = 0;  // tiles and steps so far

  // Calls visit(tile, step) for the steps of all tiles, and end(tile) after each tile.
  template <class Visit, class End>
  __device__ __forceinline__ void for_steps(Visit visit, End end) {
    for (;; ++tile_index) {
      shared.number_pipe.wait_full(tile_index);
      const uint32_t number = shared.numbers[tile_index % C::kNumbers];
      if (number >= grid.count) return;
      const BiasTile tile(p, number, grid.rows, grid.columns, C::kM, C::kN);
      for (int32_t b = tile.batch.lo; b < tile.batch.hi; ++b) {
        const Sequence s = fixed_sequence(reload(p), tile.leading, b);
        BiasStep step{{tile.leading, 0, b, {b, 0, 0, s.q_len, s.k_len, tile.row, tile.row + C::kM, 0}}, {}};
        step.band = step.work.band_inline(p);
        const Interval keys = step.band.rows(tile.row, tile.row + C::kM);
        if (intersect(keys, {tile.column, tile.column + C::kN}).empty()) continue;
        for (step.work.head = tile.heads.lo; step.work.head < tile.heads.hi; ++step.work.head, ++step_use)
          visit(tile, step);
      }
      end(tile);
    }
  }
};

template <class C>
struct BiasProducer : BiasRole<C> {
  const typename C::Maps& maps;

  // One thread: the numbers of the CTA's tiles, which a counter hands out.
  __device__ __forceinline__ void number_tiles() const {
    for (uint32_t i = 0;; ++i) {
      this->shared.number_pipe.wait_empty(i);
      const uint32_t number = i == 0 ? blockIdx.x : gridDim.x + atomicAdd(this->grid.counter, 1u);
      this->shared.numbers[i % C::kNumbers] = number;
      this->shared.number_pipe.arrive(i);
      if (number >= this->grid.count) return;
    }
  }

  // Loads a tile of query rows, and below it one of keys.
  template <class Rows, class Keys>
  __device__ __forceinline__ void load_pair(uint32_t use, const CUtensorMap& rows, const View& of_rows,
                                            const CUtensorMap& keys, const View& of_keys,
                                            const BiasTile& tile, const BlockWork& work) const {
    const auto& pipe = this->shared.pair_pipe;
    const uint32_t full = pipe.full_barrier(use),
                   to = ptx::shared_address(this->shared.pairs[use % C::kStages]);
    pipe.wait_empty(use);
    ptx::barrier_expect(full, Rows::kBytes + Keys::kBytes);
    load_rows<Rows>(to, 0, rows, full, coordinates_of(of_rows, work, work.head, tile.row));
    load_rows<Keys>(to + Rows::kBytes, 0, keys, full,
                    coordinates_of(of_keys, work, this->p.kv_head(work.head), tile.column));
  }

  // One thread.
  __device__ __forceinline__ void load_pairs() {
    const Problem& p = this->p;
    this->for_steps(
        [&](const BiasTile& tile, const BiasStep& step) {
          const uint32_t use = 2 * this->step_use;
          load_pair<typename C::QTile, typename C::KTile>(use, maps.query, p.query, maps.key, p.key, tile,
                                                          step.work);
          load_pair<typename C::DoTile, typename C::VTile>(use + 1, maps.dout, p.dout, maps.value, p.value,
                                                           tile, step.work);
        },
        [&](const BiasTile&) { this->shared.number_pipe.release_by_thread(this->tile_index); });
  }

  // One warp: the bias of each tile with any steps.
  __device__ __forceinline__ void load_bias() {
    uint32_t use = 0;
    bool loaded = false;
    this->for_steps(
        [&](const BiasTile& tile, const BiasStep& step) {
          if (loaded) return;
          const Problem& p = reload(this->p);
          ScoreOperands operands;
          operands.prepare<typename C::Score>(p, step.work, step.work.head);
          const Band all{p.q_rows, p.k_rows, 0, 0, 0};
          C::Tiles::load(this->shared, p, operands, all, tile.row, tile.column, use++);
          loaded = true;
        },
        [&](const BiasTile&) {
          loaded = false;
          this->shared.number_pipe.release(this->tile_index);
        });
  }
};

// A consumer warpgroup: 64 query rows.
template <class C>
struct BiasConsumer : BiasRole<C> {
  using T = typename C::Element;
  using S = typename C::S;
  const int consumer;
  uint32_t bias_use = 0;  // tiles with any steps so far
  bool waited = false;    // for the bias of this tile
  S s, dp, sum;

  // What a score variant is told of a step.
  struct Tile {
    const BiasConsumer& of;
    const Problem& p;
    const Band& visible;
    int32_t first_row, key;

    __device__ __forceinline__ const Band& band() const { return visible; }
    __device__ __forceinline__ int32_t row() const { return first_row; }
    template <class Add>
    __device__ __forceinline__ void apply_tiles(S& x, Add add) const {
      C::Tiles::apply(x, of.shared, p, of.tile_row(), 0, of.bias_use, add);
    }
  };

  // The warp's first row in the tile.
  __device__ __forceinline__ int32_t tile_row() const {
    return consumer * kConsumerRows + uniform(ptx::thread_index()) % kWarpgroup / 32 * 16;
  }

  // Issues S = Q Kᵀ or dP = dO Vᵀ  [64, N]
  template <class Rows, class Keys>
  __device__ __forceinline__ void start_scores(S& to, uint32_t use) const {
    const uint32_t pair = ptx::here(ptx::shared_address(this->shared.pairs[use % C::kStages]));
    const RowsDescriptor<Rows> a(pair + consumer * kConsumerRows * Rows::kPitch);
    const RowsDescriptor<Keys> b(pair + Rows::kBytes);
    this->shared.pair_pipe.wait_full(use);
    ptx::wgmma_fence();
    ptx::Wgmma<T, C::kN>::template multiply<true>(to.x[0], a.at(0), b.at(0));
#pragma unroll
    for (int k = 1; k < Rows::kChunks / 2; ++k)
      ptx::Wgmma<T, C::kN>::template multiply<false>(to.x[0], a.at(k), b.at(k));
    ptx::wgmma_commit();
  }

  // sum += dS
  __device__ __forceinline__ void add_step(const BiasTile& tile, const BiasStep& step) {
    const Problem& p = this->p;
    const auto& pipe = this->shared.pair_pipe;
    const uint32_t use = 2 * this->step_use;
    const BlockWork& work = step.work;
    const int32_t row = tile.row + tile_row();
    start_scores<typename C::QTile, typename C::KTile>(s, use);
    const auto first_of = [&](const View& view) {
      return view.as<const float>() + work.leading * view.leading[0] +
             view.offset(work.batch_row, work.head, 0);
    };
    const RowStatistics<S> rows(p, first_of(p.lse), first_of(p.delta), row, work.tile.q_len);
    start_scores<typename C::DoTile, typename C::VTile>(dp, use + 1);
    if (!waited) this->shared.score_pipe.wait_full(bias_use);
    waited = true;
    ptx::wgmma_wait<1>();
    ptx::hold(s.x[0]);
    pipe.release(use);
    const int32_t keys = work.tile.k_len - tile.column;
    const auto wait_dp = [&] {
      ptx::wgmma_wait<0>();
      ptx::hold(dp.x[0]);
      pipe.release(use + 1);
      if (keys < C::kN) hide(dp, 0, 0, [&](int) { return keys; }, FromLimit{});  // V may hold NaN there
    };
    const Interval all = step.band.common(row, row + S::kRows);
    const bool partial = !(all.lo <= tile.column && tile.column + C::kN <= all.hi);
    typename C::Score score;
    const Tile at{*this, p, step.band, row, tile.column};
    score.prefetch_gradient(at);
    tile_gradient<GradientOf::kBias>(score, at, rows, partial, s, dp, wait_dp);  // dS = P ∘ (dP − delta)
    for_each(sum, [&](float& x, int slot, int n, int e) {  // rows that see no key may hold NaN
      if (rows.lse(slot) != INFINITY) x += dp.at(slot, n, e);
    });
  }

  __device__ __forceinline__ void store(const BiasTile& tile) const {
    const View& view = this->p.dbias;
    T* const to = view.as<T>() + tile.leading * view.leading[0] + view.offset(tile.b, tile.h, 0, tile.column);
    const bool pairs = view.row % 2 == 0;
#pragma unroll
    for (int slot = 0; slot < S::kSlots; ++slot) {
      const int32_t row = tile.row + tile_row() + S::row(slot);
      if (row >= this->p.dbias_rows) continue;
      T* const out = to + row * view.row + S::column(0);
      const int32_t left = this->p.dbias_columns - tile.column - S::column(0);
#pragma unroll
      for (int n = 0; n < S::kColumnTiles; ++n) {
        const int step = S::column_step(n);
        if (pairs && step + 1 < left) {
          ptx::store_pair(out + step, sum.at(slot, n, 0), sum.at(slot, n, 1));
        } else {
          if (step < left) out[step] = T(sum.at(slot, n, 0));
          if (step + 1 < left) out[step + 1] = T(sum.at(slot, n, 1));
        }
      }
    }
  }

  __device__ __forceinline__ void run() {
    sum.clear();
    this->for_steps([&](const BiasTile& tile, const BiasStep& step) { add_step(tile, step); },
                    [&](const BiasTile& tile) {
                      if (waited) this->shared.score_pipe.release(bias_use++);
                      waited = false;
                      this->shared.number_pipe.release(this->tile_index);
                      store(tile);
                      sum.clear();
                    });
  }
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
    ptx::give_registers<producer_registers(C::kConsumers)>();
    BiasProducer<C> producer{{p, shared, grid}, maps};
    const bool leads = threadIdx.x % 32 == 0;
    if (warp == 0 && leads) producer.number_tiles();
    if (warp == 1 && leads) producer.load_pairs();
    if (warp == 2) producer.load_bias();
  } else {
    ptx::take_registers<consumer_registers(C::kConsumers)>();
    BiasConsumer<C>{{p, shared, grid}, warpgroup - 1}.run();
  }
}

template <class C>
cudaError_t launch_bias_gradient_sm90(const Problem& p, const LaunchPlan& plan, void* workspace,
                                      cudaStream_t stream) {
  typename C::Maps maps;
  const struct {
    CUtensorMap& map;
    const View& view;
    MapShape shape;
  } all[] = {
      {maps.query, p.query, {p.head_dim, p.heads, p.q_rows, p.batch, C::QTile::kPanel * 8, C::kM}},
      {maps.dout, p.dout, {p.value_dim, p.heads, p.q_rows, p.batch, C::DoTile::kPanel * 8, C::kM}},
      {maps.key, p.key, {p.head_dim, p.kv_heads, p.k_rows, p.batch, C::KTile::kPanel * 8, C::kN}},
      {maps.value, p.value, {p.value_dim, p.kv_heads, p.k_rows, p.batch, C::VTile::kPanel * 8, C::kN}},
  };
  for (const auto& [map, view, shape] : all) {
    if (cudaError_t e = make_tensor_map(map, p, view, shape); e != cudaSuccess) return e;
  }
  auto* const counter = reinterpret_cast<uint32_t*>(static_cast<char*>(workspace) + plan.tile_counter);
  if (cudaError_t e = cudaMemsetAsync(counter, 0, sizeof(uint32_t), stream); e != cudaSuccess) return e;
  const auto rows = static_cast<int32_t>(plan.queries.tiles), columns = static_cast<int32_t>(plan.keys.tiles);
  const typename C::Grid grid{static_cast<uint32_t>(plan.queries.blocks), rows, columns, counter};
  return launch(bias_gradient_sm90<C>, plan.persistent_ctas, C::kThreads, sizeof(typename C::Shared), stream,
                p, maps, grid);
}

template <class T, RowColumns R>
cudaError_t launch_row(const Problem& p, const LaunchPlan& plan, void* workspace, cudaStream_t stream) {
  LaunchPlan of_slice = plan;
  of_slice.queries.blocks /= leading_slices(p);
  return for_each_slice(p, [&](const Problem& slice) {
    return launch_score<R>(plan.score, [&]<ScoreKind kKind>() {
      using C = BiasGradientSm90<T, R.head_dim, R.value_dim, R.block_m, R.block_n, R.stages, R.warps, kKind>;
      return launch_bias_gradient_sm90<C>(slice, of_slice, workspace, stream);
    });
  });
}

}  // namespace jax_flash
