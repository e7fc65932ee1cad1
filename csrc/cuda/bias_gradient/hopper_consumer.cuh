// A consumer warpgroup of cuda/bias_gradient/hopper.cuh: 64 query rows of a tile of dbias.
#pragma once

#include <cstdint>

#include "cuda/bias_gradient/hopper_load.cuh"
#include "cuda/ptx/stmatrix.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/tile/descriptor.cuh"
#include "cuda/tile/operands.cuh"

namespace jax_flash {

// lse and delta of a lane's rows.
template <class S>
struct StagedRows {
  float lses[S::kSlots], deltas[S::kSlots];

  // row: the warp's first row.
  template <int M>
  __device__ __forceinline__ StagedRows(const QueryStatistics<M>& from, int row) {
#pragma unroll
    for (int slot = 0; slot < S::kSlots; ++slot) {
      lses[slot] = from.lse[row + S::row(slot)];
      deltas[slot] = from.delta[row + S::row(slot)];
    }
  }
  // Whether every row of the warp sees a key and has an lse that is not too large.
  __device__ __forceinline__ bool usual() const {
    bool all = true;
#pragma unroll
    for (int slot = 0; slot < S::kSlots; ++slot) all &= fabsf(lses[slot]) < kLargeShift;
    return __all_sync(~0u, all);
  }
  __device__ __forceinline__ float lse(int slot) const { return lses[slot]; }
  __device__ __forceinline__ float delta(int slot) const { return deltas[slot]; }
};

template <class C>
struct BiasConsumer : BiasRole<C> {
  using T = typename C::Element;
  using S = typename C::S;
  using Rows = typename C::Rows;
  const int consumer;
  uint32_t bias_use = 0;  // counts the uses of score_pipe
  bool waited = false;    // whether the bias of this tile has been waited for
  bool partial = false;   // the band hides some of the warp's scores
  S s, dp, sum;
  // Whether there are too few stages to load the operands of dP before S has been computed.
  static constexpr bool kLateDp = C::kStages < 2 * C::kParts;
  static constexpr bool kFloats = stages_float_bias(C::kKind);  // dbias, like the bias

  // The tile of S of a step, for its score variant.
  struct Tile {
    const BiasConsumer& consumer;
    const Problem& p;
    const Band& visible;
    int32_t first_row, key, in_tile;
    const BlockWork& work;

    __device__ __forceinline__ decltype(auto) operands() const {
      if constexpr (C::kGeneral) {
        return (consumer.shared.operands[consumer.bias_use % C::Tiles::kStages]);
      } else {
        ScoreOperands own;
        own.prepare<typename C::Score>(p, work, work.head);
        return own;
      }
    }
    // The thread's word of the consumer's rows and the tile of `key` of a boolean mask.
    __device__ __forceinline__ uint32_t mask_word(int32_t key) const {
      const int32_t row = first_row / kRowBlock;
      return consumer.grid.words.tile(work.leading, work.batch_row, work.head, row,
                                      key / kRowBlock)[threadIdx.x % kWarpgroup];
    }
    __device__ __forceinline__ const Band& band() const { return visible; }
    __device__ __forceinline__ int32_t row() const { return first_row; }
    template <class Add>
    __device__ __forceinline__ void apply_tiles(S& x, Add add) const {
      C::Tiles::apply(x, consumer.shared, p, in_tile, 0, consumer.bias_use, add);
    }
  };

  // The warp's first row in the tile.
  __device__ __forceinline__ int32_t tile_row() const {
    return consumer * kConsumerRows + uniform(ptx::thread_index()) % kWarpgroup / 32 * 16;
  }

  // Issues S = Q Kᵀ or dP = dO Vᵀ  [64, N], or adds another part of their columns.
  template <bool kFirst>
  __device__ __forceinline__ void start_part(S& to, uint32_t use) const {
    const uint32_t pair = ptx::here(ptx::shared_address(this->shared.pairs[use % C::kStages]));
    const RowsDescriptor<Rows> a(pair + consumer * kConsumerRows * Rows::kPitch);
    const RowsDescriptor<typename C::Keys> b(pair + Rows::kBytes);
    this->shared.pair_pipe.wait_full(use);
    ptx::wgmma_fence();
    ptx::Wgmma<T, C::kN>::template multiply<kFirst>(to.x[0], a.at(0), b.at(0));
#pragma unroll
    for (int k = 1; k < Rows::kChunks / 2; ++k)
      ptx::Wgmma<T, C::kN>::template multiply<false>(to.x[0], a.at(k), b.at(k));
    ptx::wgmma_commit();
  }
  template <int kPart = 0>
  __device__ __forceinline__ void start_scores(S& to, uint32_t use) const {
    start_part<kPart == 0>(to, use + kPart);
    if constexpr (kPart + 1 < C::kParts) start_scores<kPart + 1>(to, use);
  }

  // Waits for a product, after whose parts kPending others have been issued.
  template <int kPending, int kPart = 0>
  __device__ __forceinline__ void finish_scores(S& to, uint32_t use) const {
    constexpr int kPartsLeft = C::kParts - 1 - kPart;
    ptx::wgmma_wait<kPending + kPartsLeft>();
    if constexpr (kPartsLeft == 0) ptx::hold(to.x[0]);
    this->shared.pair_pipe.release(use + kPart);
    if constexpr (kPartsLeft > 0) finish_scores<kPending, kPart + 1>(to, use);
  }

  // sum += dS
  __device__ __forceinline__ void add_step(const BiasTile& tile, const BiasStep& step) {
    const uint32_t use = 2 * C::kParts * this->step_use, dp_use = use + C::kParts;
    const auto start_dp = [&] { start_scores(dp, dp_use); };
    IssueTurns<>::wait(consumer);
    start_scores(s, use);
    if constexpr (!kLateDp) start_dp();
    IssueTurns<>::allow((consumer + 1) % C::kConsumers);
    const int32_t in_tile = tile_row(), row = tile.row + in_tile;
    if (!waited) this->shared.score_pipe.wait_full(bias_use);
    waited = true;
    this->shared.row_pipe.wait_full(this->step_use);
    const StagedRows<S> rows(this->shared.statistics[this->step_use % C::kRowStages], in_tile);
    this->shared.row_pipe.release(this->step_use);
    typename C::Score score;
    const Tile at{*this, this->p, step.band, row, tile.column, in_tile, step.work};
    if constexpr (C::kReadsMask) score.prefetch_gradient(at);
    finish_scores<kLateDp ? 0 : C::kParts>(s, use);
    if constexpr (kLateDp) start_dp();
    if (step.fresh) {
      const Interval all = step.band.common(row, row + S::kRows);
      // Columns past the arrays' last key are zeros, and are not stored.
      partial = !(all.lo <= tile.column && min(tile.column + C::kN, this->p.k_rows) <= all.hi);
    }
    if (!C::kGeneral && !C::Score::kDropout && !partial && rows.usual()) {
      finish_scores<0>(dp, dp_use);
      if (shows_all(score)) return add_whole_tile<true>(rows, in_tile, score);
      if constexpr (C::kReadsMask) return add_whole_tile<false>(rows, in_tile, score);
    }
    const auto wait_dp = [&] { finish_scores<0>(dp, dp_use); };
    if constexpr (!C::kReadsMask) score.prefetch_gradient(at);
    tile_gradient<GradientOf::kBias>(score, at, rows, partial, s, dp, wait_dp);  // dS = P ∘ (dP − delta)
    if constexpr (C::kGeneral) release_score();
    for_each(sum, [&](float& x, int slot, int n, int e) {  // rows that see no key may hold NaN
      if (rows.lse(slot) != INFINITY) x += dp.at(slot, n, e);
    });
  }

  // Whether no mask hides any of the warp's scores.
  __device__ __forceinline__ bool shows_all(const typename C::Score& score) const {
    if constexpr (C::kReadsMask) return score.shown.all();
    return true;
  }

  // sum += dS of a tile that the band shows whole, if there is a bias and perhaps a mask. Without a branch on
  // the way from S to the sum, the compiler spreads the exponentials between the other instructions. kShown:
  // the mask hides nothing.
  template <bool kShown>
  __device__ __forceinline__ void add_whole_tile(const StagedRows<S>& rows, int32_t in_tile,
                                                 const typename C::Score& score_of) {
    const float scale = this->p.spec.scale;
    const uint32_t tile = C::Tiles::stage_of(this->shared, bias_use);
    for_each_bias<typename C::Tiles::BiasTile, S>(
        tile, in_tile, 0, false, [&](int slot, int n, int e, float bias) {
          float score = fmaf(s.at(slot, n, e), scale, bias);  // S ← scale · S + bias
          if constexpr (!kShown) hide_unless(score, score_of.shown.sees(slot, n, e));
          const float weight = ptx::exp2(fmaf(score, kLog2e, -rows.lse(slot)));   // P = exp(S − lse)
          sum.at(slot, n, e) += weight * (dp.at(slot, n, e) - rows.delta(slot));  // dS = P ∘ (dP − delta)
        });
  }

  __device__ __forceinline__ void release_score() {
    this->shared.score_pipe.release(bias_use++);
    waited = false;
  }

  // A bias of −∞ may hide NaN, in S and in the sum. All steps of a tile have the same bias, so its elements
  // are tested once, after the last step. With other options they are tested at each step.
  __device__ __forceinline__ void clear_hidden() {
    if (C::kGeneral || !waited) return;
    C::Tiles::apply(sum, this->shared, this->p, tile_row(), 0, bias_use, [](float& x, float bias) {
      if (bias == -INFINITY) x = 0;
    });
  }

  // Stores the warp's rows of the sum, 16 bytes at a time, through its rows of the bias tile, which no other
  // warp uses until it releases them. Stores zeros if the tile had no step.
  __device__ __forceinline__ void store_chunks(T* to, const BiasTile& tile) {
    using Sums = typename C::Tiles::BiasTile;
    uint8_t* const rows = this->shared.score_tiles.stages[bias_use % C::Tiles::kStages];
    const LaneAddress<Sums> own(ptx::shared_address(rows), tile_row() + lane_id() % 16, lane_id() / 16);
    const RegistersA<T, S> rounded{sum};
    if (waited) {
#pragma unroll
      for (int k = 0; k < C::kN / 16; ++k) {
        uint32_t block[4];
        rounded.load(block, 0, k);
        ptx::stmatrix_x4(own.at(0, 2 * k), block);
      }
      __syncwarp();
    }
    const View& view = this->p.dbias;
    const int first = tile_row() + lane_id() / 16, chunk = lane_id() % 16;
    const bool used = tile.column + 8 * chunk < this->p.dbias_columns;
#pragma unroll
    for (int i = 0; i < 16; i += 2) {
      const int32_t row = tile.row + first + i;
      uint4 x{};  // the tile had no step
      if (waited) x = *reinterpret_cast<const uint4*>(rows + Sums::offset(first + i, chunk));
      if (used && row < this->p.dbias_rows) *reinterpret_cast<uint4*>(to + row * view.row + 8 * chunk) = x;
    }
  }

  __device__ __forceinline__ void store(const BiasTile& tile) {
    const View& view = this->p.dbias;
    const int64_t first = tile.leading * view.leading[0] + view.offset(tile.b, tile.h, 0, tile.column);
    if (kFloats || this->grid.in_floats) return store_elements(view.as<float>() + first, tile);
    T* const to = view.as<T>() + first;
    if constexpr (!kFloats) {
      if (!C::kGeneral && view.row % 8 == 0 && reinterpret_cast<uintptr_t>(to) % 16 == 0)
        return store_chunks(to, tile);
      store_elements(to, tile);
    }
  }

  template <class B>
  __device__ __forceinline__ void store_elements(B* to, const BiasTile& tile) {
    const View& view = this->p.dbias;
    const bool pairs = view.row % 2 == 0;
#pragma unroll
    for (int slot = 0; slot < S::kSlots; ++slot) {
      const int32_t row = tile.row + tile_row() + S::row(slot);
      if (row >= this->p.dbias_rows) continue;
      B* const out = to + row * view.row + S::column(0);
      const int32_t left = this->p.dbias_columns - tile.column - S::column(0);
#pragma unroll
      for (int n = 0; n < S::kColumnTiles; ++n) {
        const int step = S::column_step(n);
        if (pairs && step + 1 < left) {
          ptx::store_pair(out + step, sum.at(slot, n, 0), sum.at(slot, n, 1));
        } else {
          if (step < left) out[step] = B(sum.at(slot, n, 0));
          if (step + 1 < left) out[step + 1] = B(sum.at(slot, n, 1));
        }
      }
    }
  }

  __device__ __forceinline__ void run() {
    sum.clear();
    if (consumer == C::kConsumers - 1) IssueTurns<>::allow(0);  // the first consumer begins
    this->for_steps([&](const BiasTile& tile, const BiasStep& step) { add_step(tile, step); },
                    [&](const BiasTile& tile) {
                      this->shared.number_pipe.release(this->tile_index);
                      clear_hidden();
                      store(tile);
                      if (waited) release_score();
                      sum.clear();
                    });
  }
};

}  // namespace jax_flash
