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
//   warp 2: bias, once a tile; with             sum += dS
//     other options operands, bias and      the sum is stored
//     mask of each step
//   warp 3: lse and delta
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
#include "cuda/ptx/stmatrix.cuh"
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
  static constexpr bool kGeneral = Kind == ScoreKind::kGeneralDropout;  // has a mask, too
  static constexpr int kM = M, kN = N, kThreads = Warps * 32;
  static constexpr int kConsumers = M / kConsumerRows, kNumbers = 2, kRowStages = 2;
  static constexpr int kStages =
      hopper::bias_gradient_stages(std::max(HeadDim, ValueDim), M, N, Stages, kGeneral);
  using QTile = SharedTile<T, M, HeadDim>;
  using KTile = SharedTile<T, N, HeadDim>;
  using DoTile = SharedTile<T, M, ValueDim>;
  using VTile = SharedTile<T, N, ValueDim>;
  static constexpr int kPairBytes =
      std::max<int>(QTile::kBytes + KTile::kBytes, DoTile::kBytes + VTile::kBytes);
  using S = Accumulator<1, N / 8>;
  using Score = GradientScore<Kind, S>;
  using Tiles = GradientTiles<Kind, T, M, N, static_cast<int>(hopper::kMaxSharedBytes)>;
  struct Maps {
    CUtensorMap query, key, dout, value;
  };
  // Tiles of dbias.
  struct Grid {
    uint32_t count;
    int32_t rows, columns;     // of a head
    const Interval* segments;  // what they leave to each query tile of a batch entry, or null
    uint32_t* counter;
  };
  struct Shared {
    alignas(1024) uint8_t pairs[kStages][kPairBytes];  // Q over K, or dO over V
    typename Tiles::Buffer score_tiles;
    QueryStatistics<M> statistics[kRowStages];
    ScoreOperands operands[kGeneral ? Tiles::kStages : 1];  // of a step, with which they come
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
  static_assert(kThreads == (1 + kConsumers) * kWarpgroup && registers_suffice(kThreads, kConsumers));
  static_assert(sizeof(Shared) <= hopper::kMaxSharedBytes && Tiles::kStages == 2);
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
        const Interval keys = trim_to_segments(grid.segments, grid.rows, C::kM, p, step.work,
                                               step.band.rows(tile.row, tile.row + C::kM));
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

  // One warp: lse and delta. Rows that are not in use or see no key get an lse that makes their P = 0.
  __device__ __forceinline__ void load_statistics() {
    const Problem& p = this->p;
    this->for_steps(
        [&](const BiasTile& tile, const BiasStep& step) {
          const BlockWork& work = step.work;
          const auto from = [&](const View& view) {
            return view.as<const float>() + work.leading * view.leading[0] +
                   view.offset(work.batch_row, work.head, tile.row);
          };
          const float *const lse = from(p.lse), *const delta = from(p.delta);
          constexpr int kRows = C::kM / 32;
          float lses[kRows], deltas[kRows];
#pragma unroll
          for (int i = 0; i < kRows; ++i) {
            const int32_t row = 32 * i + static_cast<int32_t>(threadIdx.x % 32);
            const bool used = tile.row + row < work.tile.q_len;
            lses[i] = used ? lse[row * p.lse.row] : -INFINITY;
            deltas[i] = used ? delta[row * p.delta.row] : 0;
          }
          this->shared.row_pipe.wait_empty(this->step_use);
          auto& to = this->shared.statistics[this->step_use % C::kRowStages];
#pragma unroll
          for (int i = 0; i < kRows; ++i) {
            const int row = 32 * i + static_cast<int>(threadIdx.x % 32);
            to.lse[row] = row_lse(lses[i]);
            to.delta[row] = row_delta(lses[i], deltas[i]);
          }
          ptx::barrier_arrive_by_warp(this->shared.row_pipe.full_barrier(this->step_use));
        },
        [&](const BiasTile&) { this->shared.number_pipe.release(this->tile_index); });
  }

  // One warp: the bias of each tile with any steps, or all that the score of a step needs.
  __device__ __forceinline__ void load_bias() {
    uint32_t use = 0;
    bool loaded = false;
    this->for_steps(
        [&](const BiasTile& tile, const BiasStep& step) {
          if (loaded) return;
          const Problem& p = reload(this->p);
          ScoreOperands operands;
          operands.prepare<typename C::Score>(p, step.work, step.work.head);
          // A tile's bias serves sequences of several lengths.
          const Band used = C::kGeneral ? step.band : Band{p.q_rows, p.k_rows, 0, 0, 0};
          this->shared.score_pipe.wait_empty(use);
          if constexpr (C::kGeneral) {
            if (threadIdx.x % 32 == 0) this->shared.operands[use % C::Tiles::kStages] = operands;
            __threadfence_block();
          }
          C::Tiles::load(this->shared, p, operands, used, tile.row, tile.column, use++);
          loaded = !C::kGeneral;
        },
        [&](const BiasTile&) {
          loaded = false;
          this->shared.number_pipe.release(this->tile_index);
        });
  }
};

// lse and delta of a lane's rows.
template <class S>
struct StagedRows {
  float lses[S::kSlots], deltas[S::kSlots];

  // row: the warp's first.
  template <int M>
  __device__ __forceinline__ StagedRows(const QueryStatistics<M>& from, int row) {
#pragma unroll
    for (int slot = 0; slot < S::kSlots; ++slot) {
      lses[slot] = from.lse[row + S::row(slot)];
      deltas[slot] = from.delta[row + S::row(slot)];
    }
  }
  __device__ __forceinline__ float lse(int slot) const { return lses[slot]; }
  __device__ __forceinline__ float delta(int slot) const { return deltas[slot]; }
};

// A consumer warpgroup: 64 query rows.
template <class C>
struct BiasConsumer : BiasRole<C> {
  using T = typename C::Element;
  using S = typename C::S;
  const int consumer;
  uint32_t bias_use = 0;  // of what comes through score_pipe
  bool waited = false;    // for the bias of this tile
  S s, dp, sum;

  // What a score variant is told of a step.
  struct Tile {
    const BiasConsumer& of;
    const Problem& p;
    const Band& visible;
    int32_t first_row, key;

    __device__ __forceinline__ const ScoreOperands& operands() const {
      return of.shared.operands[of.bias_use % C::Tiles::kStages];
    }
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
    start_scores<typename C::DoTile, typename C::VTile>(dp, use + 1);
    if (!waited) this->shared.score_pipe.wait_full(bias_use);
    waited = true;
    this->shared.row_pipe.wait_full(this->step_use);
    const StagedRows<S> rows(this->shared.statistics[this->step_use % C::kRowStages], tile_row());
    this->shared.row_pipe.release(this->step_use);
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
    if constexpr (C::kGeneral) release_score();
    for_each(sum, [&](float& x, int slot, int n, int e) {  // rows that see no key may hold NaN
      if (rows.lse(slot) != INFINITY) x += dp.at(slot, n, e);
    });
  }

  __device__ __forceinline__ void release_score() {
    this->shared.score_pipe.release(bias_use++);
    waited = false;
  }

  // Stores the warp's rows of the sum by 16 bytes, through its rows of the tile of the bias, which are its
  // own until it releases them.
  __device__ __forceinline__ void store_chunks(T* to, const BiasTile& tile) {
    using Sums = typename C::Tiles::BiasTile;
    uint8_t* const rows = this->shared.score_tiles.stages[bias_use % C::Tiles::kStages];
    const LaneAddress<Sums> own(ptx::shared_address(rows), tile_row() + lane_id() % 16, lane_id() / 16);
    const RegistersA<T, S> rounded{sum};
#pragma unroll
    for (int k = 0; k < C::kN / 16; ++k) {
      uint32_t block[4];
      rounded.load(block, 0, k);
      ptx::stmatrix_x4(own.at(0, 2 * k), block);
    }
    __syncwarp();
    const View& view = this->p.dbias;
    const int first = tile_row() + lane_id() / 16, chunk = lane_id() % 16;
    const bool used = tile.column + 8 * chunk < this->p.dbias_columns;
#pragma unroll
    for (int i = 0; i < 16; i += 2) {
      const int32_t row = tile.row + first + i;
      const uint4 x = *reinterpret_cast<const uint4*>(rows + Sums::offset(first + i, chunk));
      if (used && row < this->p.dbias_rows) *reinterpret_cast<uint4*>(to + row * view.row + 8 * chunk) = x;
    }
  }

  __device__ __forceinline__ void store(const BiasTile& tile) {
    const View& view = this->p.dbias;
    T* const to = view.as<T>() + tile.leading * view.leading[0] + view.offset(tile.b, tile.h, 0, tile.column);
    if (waited && view.row % 8 == 0 && reinterpret_cast<uintptr_t>(to) % 16 == 0)
      return store_chunks(to, tile);
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
                      this->shared.number_pipe.release(this->tile_index);
                      store(tile);
                      if (waited) release_score();
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
    if (warp == 3) producer.load_statistics();
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
  const typename C::Grid grid{static_cast<uint32_t>(plan.queries.blocks), rows, columns,
                              segments_of(plan.queries, workspace), counter};
  return launch(bias_gradient_sm90<C>, plan.persistent_ctas, C::kThreads, sizeof(typename C::Shared), stream,
                p, maps, grid);
}

template <class T, RowColumns R>
cudaError_t launch_row(const Problem& p, const LaunchPlan& plan, void* workspace, cudaStream_t stream) {
  LaunchPlan of_slice = plan;
  of_slice.queries.blocks /= leading_slices(p);
  return for_each_slice(p, [&](const Problem& slice) {
    if (&slice != &p) {
      if (cudaError_t e = launch_schedules(slice, of_slice, workspace, stream); e != cudaSuccess) return e;
    }
    return launch_score<R>(plan.score, [&]<ScoreKind kKind>() {
      using C = BiasGradientSm90<T, R.head_dim, R.value_dim, R.block_m, R.block_n, R.stages, R.warps, kKind>;
      return launch_bias_gradient_sm90<C>(slice, of_slice, workspace, stream);
    });
  });
}

}  // namespace jax_flash
