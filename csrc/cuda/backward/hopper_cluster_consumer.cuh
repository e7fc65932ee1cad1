// The base class of the consumer warpgroups of cuda/backward/hopper_cluster.cuh, and the warpgroup that
// computes P and dV. Scores are transposed, with a row for each of the CTA's 64 keys, so that Pᵀ and dSᵀ are
// in registers as the left operands of dV and dK. The same thread of the first two warpgroups holds the same
// elements of Sᵀ and dPᵀ.
#pragma once

#include <cstdint>

#include "cuda/backward/hopper_cluster_state.cuh"
#include "cuda/backward/hopper_consumer.cuh"
#include "cuda/backward/query_step.cuh"
#include "cuda/epilogue.cuh"
#include "cuda/gradient.cuh"
#include "cuda/ptx/stmatrix.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/tile/descriptor.cuh"

namespace jax_flash {

// The state and helpers that all three warpgroups share.
template <class C>
struct ClusterConsumer {
  using Config = C;
  using T = typename C::Element;
  using S = typename C::S;
  using KHalf = typename C::KHalf;
  using VHalf = typename C::VHalf;
  using QHalf = typename C::QHalf;
  using DoHalf = typename C::DoHalf;
  using DsTile = typename C::DsTile;
  using Fragments = typename C::Fragments;

  static constexpr int consumer = 0;  // the three warpgroups have the same 64 keys, so each is consumer 0

  const Problem& p;
  typename C::Shared& shared;
  const KeyGrid& grid;
  uint32_t tile_index = 0, step_use = 0;  // key tiles and steps so far

  __device__ __forceinline__ ClusterConsumer(const Problem& problem, typename C::Shared& memory,
                                             const KeyGrid& key_grid)
      : p(problem), shared(memory), grid(key_grid) {}

  __device__ __forceinline__ static uint32_t warp_row() {
    return static_cast<uint32_t>(ptx::thread_index()) % kWarpgroup / 32 * 16;
  }
  __device__ __forceinline__ static int32_t rank() { return static_cast<int32_t>(ptx::cluster_rank()); }
  __device__ __forceinline__ static int32_t part() { return key_part<C>(ptx::cluster_rank()); }
  __device__ __forceinline__ const typename C::Shared::Tile& tile() const {
    return shared.tiles[tile_index % kKeyTileStates<C>];
  }
  // The warp's first key within the sequence.
  __device__ __forceinline__ int32_t key() const {
    return uniform(tile().work.tile.row) + part() * kConsumerRows + warp_row();
  }

  // The use of do_pipe for one half of a step's dO.
  __device__ __forceinline__ static uint32_t do_use(uint32_t use, int half) { return 2 * use + half; }
  __device__ __forceinline__ const uint8_t* d_out(uint32_t use, int half) const {
    return shared.d_out[do_use(use, half) % C::kDoStages];
  }

  // This lane's address in the warp's 16 keys of Pᵀ, later dSᵀ, for stmatrix and ldmatrix.
  __device__ __forceinline__ LaneAddress<DsTile> ds_address(uint32_t use) const {
    return {ptx::shared_address(shared.ds[use % C::kDsStages]),
            static_cast<int>(part() * kConsumerRows + warp_row() + ptx::lane_index() % 16),
            static_cast<int>(ptx::lane_index() / 16)};
  }

  // Issues S (+)= A Bᵀ over half of a CTA's columns. Both operands are K-major.
  template <bool kFirst, class Rows, class Columns>
  __device__ __forceinline__ static void start_product(S& to, const uint8_t* rows, const uint8_t* columns) {
    const RowsDescriptor<Rows> a(ptx::here(ptx::shared_address(rows)));
    const RowsDescriptor<Columns> b(ptx::here(ptx::shared_address(columns)));
    using Product = ptx::Wgmma<T, C::kM>;
    Product::template multiply<kFirst>(to.x[0], a.at(0), b.at(0));
#pragma unroll
    for (int step = 1; step < Rows::kChunks / 2; ++step)
      Product::template multiply<false>(to.x[0], a.at(step), b.at(step));
  }

  // Issues sum += A B for A in registers and an MN-major B.
  template <class Tile, class Sum>
  __device__ __forceinline__ static void start_sum(Sum& sum, const Fragments& a, const uint8_t* tile) {
    const ColumnsDescriptor<Tile> b(ptx::here(ptx::shared_address(tile)));
#pragma unroll
    for (int step = 0; step < C::kM / 16; ++step)
      ptx::Wgmma<T, Tile::kColumns>::template multiply<false, 1>(sum.x[0], a.x[0][step], b.at(step));
  }

  __device__ __forceinline__ static void round(Fragments& to, const S& from) {
    const RegistersA<T, S> rounded{from};
#pragma unroll
    for (int k = 0; k < C::kM / 16; ++k) rounded.load(to.x[0][k], 0, k);
  }

  // K ← 0 and V ← 0 in rows that are not in use, since they may hold NaN. The three warpgroups divide the
  // rows. Each inlines this code, so their barrier is not aligned.
  __device__ __forceinline__ void clear_keys() const {
    const int32_t clean = uniform(tile().clean_keys);
    if (clean >= C::kN) return;
    constexpr int kThreads = C::kConsumers * kWarpgroup;
    const int thread = ptx::thread_index() - kWarpgroup;
    shared.k_pipe.wait_full(tile_index);
    shared.v_pipe.wait_full(tile_index);
    const auto rows_of = [clean](int32_t of) {
      return [count = clean - of * kConsumerRows](int row) { return row < count; };
    };
    const auto own = rows_of(part());
    clear_rows<KHalf>(shared.k[0], own, thread, kThreads);
    clear_rows<KHalf>(shared.k[1], own, thread, kThreads);
    if constexpr (C::kKeyParts > 1) clear_rows<KHalf>(shared.k_other, rows_of(1 - part()), thread, kThreads);
    clear_rows<VHalf>(shared.v[0], own, thread, kThreads);
    clear_rows<VHalf>(shared.v[1], own, thread, kThreads);
    ptx::fence_async_shared();
    __syncwarp();  // lanes have cleared different numbers of chunks
    ptx::sync_any_group(1, kThreads);
  }

  // Calls start(step) for the first step of the key tile, next(step) for the others, then last(number) with
  // the number of the last step.
  template <class Start, class Next, class Last>
  __device__ __forceinline__ void for_steps(Start start, Next next, Last last) {
    const auto walk = steps_of(tile().walk);
    if (walk.tiles.empty()) return;
    clear_keys();
    QueryStep step = QueryStep::first(walk, step_use);
    const int32_t end = step.number + walk.steps();
    start(step);
    step.advance(walk);
#pragma unroll 1
    for (; step.number < end; step.advance(walk)) next(step);
    step_use = ptx::here(step.number);
    last(step_use - 1);
  }
};

// Computes Sᵀ = K Qᵀ, Pᵀ = exp(Sᵀ − lse) and dV += Pᵀ dO.
template <class C>
struct ScoreConsumer : ClusterConsumer<C> {
  using Base = ClusterConsumer<C>;
  using Base::Base, Base::p, Base::shared, Base::tile, Base::tile_index;
  using typename Base::DoHalf, typename Base::KHalf, typename Base::QHalf, typename Base::S;

  S s;                       // Sᵀ, then Pᵀ  [64, M]
  typename C::Fragments pt;  // Pᵀ, rounded
  typename C::DVHalf dv[2];  // dV [64, dv]

  // Whether dV and dSᵀ use the same Pᵀ; else share() passes W for dSᵀ.
  static constexpr bool kSharesP = !C::Score::kScalesGradient && !C::Score::kDropout;

  __device__ __forceinline__ void start_scores(uint32_t use) {
    const auto& q = shared.q[use % C::kStages];
    shared.lse_pipe.wait_full(use);
    shared.q_pipe.wait_full(use);
    ptx::wgmma_fence();
    this->template start_product<true, KHalf, QHalf>(s, shared.k[0], q[0]);
    this->template start_product<false, KHalf, QHalf>(s, shared.k[1], q[1]);
    ptx::wgmma_commit();
  }

  __device__ __forceinline__ void start_dv(uint32_t use) {
    ptx::hold(dv[0].x[0]);
    ptx::hold(dv[1].x[0]);
    shared.delta_pipe.wait_full(use);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      shared.do_pipe.wait_full(this->do_use(use, half));
      ptx::wgmma_fence();
      this->template start_sum<DoHalf>(dv[half], pt, this->d_out(use, half));
      ptx::wgmma_commit();
    }
  }

  // Waits for dV += Pᵀ dO of a step.
  __device__ __forceinline__ void finish_dv(uint32_t use) {
    ptx::wgmma_wait<1>();
    ptx::hold(dv[0].x[0]);
    shared.do_pipe.release_in_all(this->do_use(use, 0), C::kKeyParts);
    ptx::wgmma_wait<0>();
    ptx::hold(dv[1].x[0]);
    ptx::hold(pt.x[0]);
    shared.do_pipe.release_in_all(this->do_use(use, 1), C::kKeyParts);
    shared.delta_pipe.release(use);
  }

  // Waits for Sᵀ, while kPending wgmma groups of the step before are in flight.
  template <int kPending>
  __device__ __forceinline__ void wait_scores(uint32_t use) {
    ptx::wgmma_wait<kPending>();
    ptx::hold(s.x[0]);
    shared.q_pipe.release_in_all(use, C::kKeyParts);
  }

  // Waits for Sᵀ over all columns, with no other wgmma in flight. If the CTAs split the columns, calls
  // meanwhile() while they exchange their parts of Sᵀ.
  template <class Meanwhile>
  __device__ __forceinline__ void complete_scores(uint32_t use, Meanwhile meanwhile) {
    wait_scores<0>(use);
    if constexpr (C::kSplitsColumns) {
      shared.parts.s.send(s, 0, use);
      meanwhile();
      shared.parts.s.receive(s, 0, use);
    }
  }

  // pt ← Pᵀ = exp(Sᵀ − lse), rounded; also passes Pᵀ or W to the warpgroup of dSᵀ. wait() waits for Sᵀ, and
  // finish() for dV += Pᵀ dO of the step before, if it is still in flight.
  template <class Wait, class Finish>
  __device__ __forceinline__ void finish_scores(const QueryStep& number, Wait wait, Finish finish) {
    const QueryStep& step = shared.step_ring.get(number);
    const uint32_t use = step.number, stage = use % C::kStages;
    const auto partial = [&] {
      if constexpr (kMarksSteps<C>) return is_partial_of(shared.large_lse[stage], 0);
      return !uniform(tile().whole[this->part()]).contains(step.tile);
    };
    if constexpr (kPlainSteps<C>) {
      SeenByStep<C> seen;
      if constexpr (SeenByStep<C>::kFetched)
        if (partial()) seen.fetch(p, tile(), step, this->key());
      wait();
      if (partial()) hide_unseen_keys<C>(s, p, tile(), step, this->key(), seen);
      probabilities_of_keys<kLargeLseMask<C>>(s, shared.statistics[stage].lse, shared.large_lse[stage],
                                              p.spec.scale * kLog2e);
      shared.lse_pipe.release(use);
      finish();
      this->round(pt, s);
      share(pt, use);
    } else {
      using Tile = StepTile<ScoreConsumer>;
      typename C::Score score;
      score.prefetch_gradient(Tile{*this, step});
      wait();
      if constexpr (!kSharesP) finish();  // frees the registers of pt for W
      const StepRows<S, C::kM> rows(shared.statistics[stage], shared.large_lse[stage]);
      S w;
      tile_weights(score, Tile{*this, step}, rows, partial(), s, w);
      shared.lse_pipe.release(use);
      if constexpr (kSharesP) {
        finish();
      } else {
        typename C::Fragments marked;
        this->round(marked, w);
        share(marked, use);
      }
      this->round(pt, s);
      if constexpr (kSharesP) share(pt, use);
    }
    if constexpr (C::kSplitsColumns) shared.parts.s.release(0, use);
    ptx::hold(pt.x[0]);
  }

  // Passes Pᵀ or W to the warpgroup that computes dSᵀ.
  __device__ __forceinline__ void share(const typename C::Fragments& x, uint32_t use) const {
    shared.p_pipe.wait_empty(use);
    const auto to = this->ds_address(use);
#pragma unroll
    for (int k = 0; k < C::kM / 16; ++k) ptx::stmatrix_x4(to.at(0, 2 * k), x.x[0][k]);
    ptx::barrier_arrive_by_warp(shared.p_pipe.full_barrier(use));
  }

  __device__ __forceinline__ void run_tile() {
    this->for_steps(
        [&](const QueryStep& step) {
          shared.k_pipe.wait_full(tile_index);
          start_scores(step.number);
          finish_scores(step, [&] { complete_scores(step.number, [] {}); }, [] {});
        },
        [&](const QueryStep& step) {
          const uint32_t use = step.number;
          start_scores(use);
          if constexpr (C::kSplitsColumns) {
            const auto multiply = [&] { start_dv(use - 1), finish_dv(use - 1); };
            finish_scores(step, [&] { complete_scores(use, multiply); }, [] {});
          } else {
            start_dv(use - 1);
            finish_scores(step, [&] { wait_scores<2>(use); }, [&] { finish_dv(use - 1); });
          }
        },
        [&](uint32_t use) {
          shared.k_pipe.release(tile_index);
          start_dv(use);
          finish_dv(use);
        });
  }

  __device__ __forceinline__ void run() {
    for (;; ++tile_index) {
      shared.state_pipe.wait_full(tile_index);
      if (uniform(tile().done)) return;
      dv[0].clear(), dv[1].clear();
      run_tile();
      if (uniform(tile().walk.tiles).empty()) {
        shared.k_pipe.wait_full(tile_index);
        shared.k_pipe.release(tile_index);
      }
      if constexpr (C::Score::kDropout) {  // dV ← dV / (1 − rate)
        const float factor = dropout_scale(p.spec);
        for (auto& half : dv) for_each(half, [&](float& x, int, int, int) { x *= factor; });
      }
      const bool in_floats = this->grid.head_parts > 1;
      auto to = tile().dvalue;
      to.skip_columns(first_own_column<C, DoHalf>(), in_floats ? 2 : 1);
      for (auto& half : dv) clear_rows_from(tile().work.tile.used_keys() - this->key(), half);
      store_gradient_rows(dv[0], to, this->key(), tile().work.tile.end, in_floats);
      to.skip_columns(DoHalf::kColumns, in_floats ? 2 : 1);
      store_gradient_rows(dv[1], to, this->key(), tile().work.tile.end, in_floats);
      shared.state_pipe.release(tile_index);
    }
  }
};

}  // namespace jax_flash
