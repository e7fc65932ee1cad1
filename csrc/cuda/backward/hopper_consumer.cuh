// A consumer warpgroup of cuda/backward/hopper.cuh: 64 keys of a key tile. Scores are transposed, with a row
// for each key, so that Pᵀ and dSᵀ are in registers as the left operands of dV and dK.
#pragma once

#include <cstdint>

#include "cuda/backward/hopper_block_steps.cuh"
#include "cuda/backward/hopper_dropout.cuh"
#include "cuda/backward/hopper_kept_sums.cuh"
#include "cuda/backward/hopper_state.cuh"
#include "cuda/backward/hopper_step.cuh"
#include "cuda/backward/hopper_sums.cuh"
#include "cuda/backward/hopper_tickets.cuh"
#include "cuda/backward/query_step.cuh"
#include "cuda/epilogue.cuh"
#include "cuda/gradient.cuh"
#include "cuda/mask.cuh"
#include "cuda/ptx/atomic.cuh"
#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/stmatrix.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/tile/descriptor.cuh"
#include "cuda/tile/operands.cuh"

namespace jax_flash {

// A consumer warpgroup and its registers.
template <class C>
struct GradientConsumer {
  using Config = C;
  using T = typename C::Element;
  using S = typename C::S;
  using KTile = typename C::KTile;
  using VTile = typename C::VTile;
  using QTile = typename C::QTile;
  using DoTile = typename C::DoTile;
  using DsTile = typename C::DsTile;

  const Problem& p;
  typename C::Shared& shared;
  const KeyGrid& grid;
  const int consumer;
  uint32_t tile_index = 0, step_use = 0;  // key tiles and steps so far
  S s, dp;                                // Sᵀ, then Pᵀ, and dPᵀ, then dSᵀ  [64, M]
  typename C::Fragments pt, dst;          // Pᵀ and dSᵀ, rounded
  typename C::DK dk;                      // dK [64, d]
  typename C::DV dv;                      // dV [64, dv]
  typename C::DQ dq;                      // 64 rows of the sum over all keys, or half of its columns
  FragmentsA<T, 1, C::kKeysInRegisters ? C::HeadDim / 16 : 1> held_keys;

  __device__ __forceinline__ GradientConsumer(const Problem& problem, typename C::Shared& memory,
                                              const KeyGrid& key_grid, int index)
      : p(problem), shared(memory), grid(key_grid), consumer(index) {}

  // Unsigned, because the remainder of a signed number takes more instructions.
  __device__ __forceinline__ static uint32_t lane() {
    return static_cast<uint32_t>(ptx::thread_index()) % 32;
  }
  __device__ __forceinline__ static uint32_t warp_row() {
    return static_cast<uint32_t>(ptx::thread_index()) % kWarpgroup / 32 * 16;
  }
  // The index of this warp among all consumer warps.
  __device__ __forceinline__ int warp_index() const {
    return consumer * kConsumerWarps + static_cast<int>(warp_row() / 16);
  }
  // The key tile.
  __device__ __forceinline__ const typename C::Shared::Tile& tile() const {
    return shared.tiles[tile_index % kKeyTileStates<C>];
  }
  // The warp's first key within the sequence.
  __device__ __forceinline__ int32_t key() const {
    const int32_t warp = uniform(ptx::thread_index()) % kWarpgroup / 32;
    return uniform(tile().work.tile.row) + consumer * kConsumerRows + warp * 16;
  }

  // A tile as an operand of Sᵀ or dPᵀ: its rows, or the consumer's keys of it.
  template <class Tile>
  __device__ __forceinline__ static RowsDescriptor<Tile> rows(const uint8_t* tile, int first = 0) {
    return RowsDescriptor<Tile>(ptx::here(ptx::shared_address(tile) + first * Tile::kPitch));
  }
  __device__ __forceinline__ decltype(auto) keys() const {
    if constexpr (C::kKeysInRegisters) {
      return (held_keys);
    } else {
      return rows<KTile>(shared.keys(tile_index), consumer * kConsumerRows);
    }
  }
  __device__ __forceinline__ RowsDescriptor<VTile> values() const {
    return rows<VTile>(shared.values(tile_index), consumer * kConsumerRows);
  }
  __device__ __forceinline__ void hold_keys() {
    const RowsA<KTile> of_tile(ptx::shared_address(shared.keys(tile_index)),
                               consumer * kConsumerRows + static_cast<int>(warp_row()));
    held_keys.read(of_tile);
    ptx::hold(held_keys.x[0]);
  }

  // Issues dV += Pᵀ dO or dK += dSᵀ Q, with kRows query rows.
  template <class Tile, int kRows = C::kM, class Sum>
  __device__ __forceinline__ void start_sum(Sum& sum, const typename C::Fragments& a, const uint8_t* tile) {
    const ColumnsDescriptor<Tile> b(ptx::here(ptx::shared_address(tile)));
#pragma unroll
    for (int step = 0; step < kRows / 16; ++step)
      ptx::Wgmma<T, Tile::kColumns>::template multiply<false, 1>(sum.x[0], a.x[0][step], b.at(step));
    ptx::wgmma_commit();
  }

  // Issues dQ = dS K, with the dS of both consumers. `listed`: the step's list element, if steps are listed.
  // In a listed step, only consumers some of whose keys are visible have dS; at least one consumer does.
  __device__ __forceinline__ void start_dq(uint32_t use, int32_t listed) {
    constexpr int kSteps = (kListsSteps<C> ? kConsumerRows : C::kN) / 16;
    const bool first = !kListsSteps<C> || KeyPieces::seen(listed, 0) != SeenPiece::kNone;
    const bool more = kListsSteps<C> && first && KeyPieces::seen(listed, 1) != SeenPiece::kNone;
    const uint32_t row = first ? 0 : kConsumerRows;
    shared.ds_pipe.wait_full(use);
    const uint32_t ds = ptx::here(ptx::shared_address(shared.ds[use % C::kDsStages])) + row * DsTile::kPitch,
                   k = ptx::here(ptx::shared_address(shared.keys(tile_index))) + row * KTile::kPitch;
    const ColumnsDescriptor<DsTile> a(C::kDqByRows ? ds + DsTile::panel_offset(8 * consumer) : ds);
    const ColumnsDescriptor<KTile> b(C::kDqByRows ? k
                                                  : k + KTile::panel_offset(consumer * C::kDqColumns / 8));
    using Product = ptx::Wgmma<T, C::kDqColumns>;
    ptx::wgmma_fence();
    Product::template multiply<true, 1, 1>(dq.x[0], a.at(0), b.at(0));
#pragma unroll
    for (int step = 1; step < kSteps; ++step)
      Product::template multiply<false, 1, 1>(dq.x[0], a.at(step), b.at(step));
    if (more) {
      ptx::wgmma_fence();
#pragma unroll
      for (int step = kSteps; step < C::kN / 16; ++step)
        Product::template multiply<false, 1, 1>(dq.x[0], a.at(step), b.at(step));
    }
    ptx::wgmma_commit();
  }

  // Skips a step in which no key of this consumer is visible: issues no product but dQ of the step before.
  template <bool kFirst>
  __device__ __forceinline__ void skip_step(uint32_t use, int32_t sum_before, int32_t listed_before) {
    shared.ready_pipe.release(use);
    if constexpr (!kSkipsBlocks<C>) shared.ds_pipe.arrive_by_warp(use);
    if constexpr (C::kAlternates) Turns::wait(consumer);
    if constexpr (C::kKeepsSums && !kFirst) fetch_sums(*this, sum_before);
    if constexpr (!kFirst) start_dq(use - 1, listed_before);
    if constexpr (kSkipsBlocks<C>) dst = {}, share_ds(use);  // dQ has the dS of both consumers
    allow_issue(1 - consumer);
    shared.do_pipe.release(use);
    shared.q_pipe.release(use);
    if constexpr (!kFirst) finish_dq<0>(use - 1, sum_before);
  }

  // Pᵀ = exp(Sᵀ − lse), from a row of the step on.
  template <class Scores>
  __device__ __forceinline__ void exponentiate(Scores& s, uint32_t stage, int first_row = 0) {
    probabilities_of_keys<kLargeLseMask<C>>(s, shared.statistics[stage].lse + first_row,
                                            shared.large_lse[stage], p.spec.scale * kLog2e);
  }

  // dSᵀ = Pᵀ ∘ (dPᵀ − delta)
  template <class Scores>
  __device__ __forceinline__ void differentiate(const Scores& s, Scores& dp, uint32_t stage,
                                                int first_row = 0) {
    if constexpr (C::kStartsFromDelta) {
      for_each(dp, [&](float& x, int slot, int n, int e) { x *= s.at(slot, n, e); });
      return;
    }
    const auto* delta =
        reinterpret_cast<const float2*>(shared.statistics[stage].delta + first_row) + ptx::lane_index() % 4;
#pragma unroll
    for (int slot = 0; slot < Scores::kSlots; slot += 2) {
      const float2 d = delta[2 * slot];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        dp.at(slot, 0, e) = s.at(slot, 0, e) * (dp.at(slot, 0, e) - d.x);
        dp.at(slot + 1, 0, e) = s.at(slot + 1, 0, e) * (dp.at(slot + 1, 0, e) - d.y);
      }
    }
  }

  template <class Scores>
  __device__ __forceinline__ void round(typename C::Fragments& to, const Scores& from) {
    const RegistersA<T, Scores> rounded{from};
#pragma unroll
    for (int k = 0; k < Scores::kRows / 16; ++k) rounded.load(to.x[0][k], 0, k);
  }

  // Stores dSᵀ in shared memory, for both consumers' dQ.
  __device__ __forceinline__ void share_ds(uint32_t use) {
    const LaneAddress<DsTile> to = empty_ds(*this, use);
#pragma unroll
    for (int k = 0; k < C::kM / 16; ++k) ptx::stmatrix_x4(to.at(0, 2 * k), dst.x[0][k]);
    ptx::fence_async_shared();
    shared.ds_pipe.arrive_by_warp(use);
  }

  // Waits for dQ of a step, after which kIssued products were issued, and adds it to the sums. `sum`: see
  // index_of_sum().
  template <int kIssued>
  __device__ __forceinline__ void finish_dq(uint32_t use, int32_t sum) {
    ptx::wgmma_wait<kIssued>();
    ptx::hold(dq.x[0]);
    if constexpr (C::kReleasesDs) shared.ds_pipe.release(use);
    if constexpr (C::kKeepsSums) {
      keep_dq(*this, sum);
    } else if constexpr (C::kStoresDq) {
      store_dq(*this, sum);
    } else if constexpr (C::kOrdered) {
      add_dq_in_order(*this, use, sum);
    } else if (kStagesTiles<C> && grid.tickets) {
      add_dq_by_ticket(*this, sum);
    } else {
      add_dq(*this, sum);
    }
  }

  // Whether the band hides some of a step's scores.
  __device__ __forceinline__ bool is_partial(const QueryStep& step) const {
    if constexpr (kMarksSteps<C>) return is_partial_of(shared.large_lse[step.number % C::kStages], consumer);
    return !uniform(tile().whole[consumer]).contains(step.tile);
  }

  // Allows consumer `to` to issue its sums.
  using Turns = IssueTurns<2>;
  __device__ __forceinline__ static void allow_issue(int to) {
    if constexpr (C::kAlternates) Turns::allow(to);
  }

  // A step. It computes dQ of the step before, so that no consumer waits for the other's dS of this step.
  // `listed`: the list element of the step before; afterwards that of this one.
  template <bool kFirst, class Walk>
  __device__ __forceinline__ void run_step(QueryStep& step, const Walk& walk, int32_t sum_before,
                                           int32_t& listed) {
    const uint32_t use = step.number, stage = use % C::kStages;
    shared.ready_pipe.wait_full(use);
    const int32_t listed_before = listed;
    if constexpr (kListsSteps<C>) {
      listed = shared.step_ring.element(step);
      step = shared.step_ring.get(step);
      if (KeyPieces::seen(listed, consumer) == SeenPiece::kNone)
        return skip_step<kFirst>(use, sum_before, listed_before);
    }
    if constexpr (C::kStartsFromDelta) {
      start_from_delta(dp, shared.statistics[stage].delta);
      ptx::hold(dp.x[0]);
    }
    start_scores<T>(s, keys(), rows<QTile>(shared.q[stage]));                               // Sᵀ = K Qᵀ
    start_scores<T, C::kStartsFromDelta>(dp, values(), rows<DoTile>(shared.d_out[stage]));  // dPᵀ = V dOᵀ
    if constexpr (C::kKeepsSums && !kFirst) fetch_sums(*this, sum_before);
    const auto wait_dp = [this] {
      ptx::wgmma_wait<0>();
      ptx::hold(dp.x[0]);
    };
    if constexpr (kPlainSteps<C>) {
      SeenByStep<C> seen;
      if constexpr (SeenByStep<C>::kFetched)
        if (is_partial(step)) seen.fetch(p, tile(), step, key());
      ptx::wgmma_wait<1>();
      ptx::hold(s.x[0]);
      if (is_partial(step)) hide_unseen_keys<C>(s, p, tile(), step, key(), seen);
      exponentiate(s, stage);  // Pᵀ = exp(Sᵀ − lse)
      wait_dp();
      differentiate(s, dp, stage);  // dSᵀ = Pᵀ ∘ (dPᵀ − delta)
    } else {
      using Tile = StepTile<GradientConsumer>;
      typename C::Score score;
      if constexpr (!C::kDrawsAhead) score.prefetch_gradient(Tile{*this, step});
      ptx::wgmma_wait<1>();
      ptx::hold(s.x[0]);
      const StepRows<S, C::kM> rows(shared.statistics[stage], shared.large_lse[stage]);
      tile_gradient(score, Tile{*this, step}, rows, is_partial(step), s, dp, [&] {
        wait_dp();
        if constexpr (C::kDrawsAhead) score.kept_elements = KeptOfStep{*this, use}.load();
      });
    }
    shared.ready_pipe.release(use);
    round(pt, s);
    round(dst, dp);
    if constexpr (!C::kSharesDsLate) share_ds(use);
    ptx::hold(pt.x[0]);
    ptx::hold(dst.x[0]);
    ptx::hold(dv.x[0]);
    ptx::hold(dk.x[0]);
    if constexpr (C::kAlternates) Turns::wait(consumer);
    if constexpr (!kFirst) start_dq(use - 1, listed_before);  // dQ = dS K of the step before
    ptx::wgmma_fence();
    start_sum<DoTile>(dv, pt, shared.d_out[stage]);  // dV += Pᵀ dO
    if constexpr (C::kSharesDsLate) share_ds(use);   // overlaps with the products
    start_sum<QTile>(dk, dst, shared.q[stage]);      // dK += dSᵀ Q
    allow_issue(1 - consumer);
    if constexpr (C::kDrawsAhead) draw_next(*this, step, walk);  // overlaps with the products
    if constexpr (!kFirst) finish_dq<2>(use - 1, sum_before);
    ptx::wgmma_wait<1>();
    ptx::hold(dv.x[0]);
    ptx::hold(pt.x[0]);
    shared.do_pipe.release(use);
    ptx::wgmma_wait<0>();
    ptx::hold(dk.x[0]);
    ptx::hold(dst.x[0]);
    shared.q_pipe.release(use);
  }

  // Finds the segments of the warp's keys.
  __device__ __forceinline__ void find_segments() {
    const int32_t count = tile().band.k_len - key();
    if (!p.q_segment_ids || count <= 0) return;
    const auto keys = SegmentRange::of<16>(tile().score.kv_segments + key(), count);
    if (lane() == 0) shared.segments.keys[warp_index()] = keys;
    __syncwarp();
  }

  // All steps of the key tile.
  __device__ __forceinline__ void differentiate_tile() {
    const auto walk = steps_of(tile().walk);
    if (walk.tiles.empty()) return shared.release_values(tile_index);
    const int32_t clean_keys = uniform(tile().clean_keys);
    if (clean_keys < C::kN) clear_keys<C>(shared, tile_index, clean_keys);
    if constexpr (C::kKeysInRegisters) hold_keys();
    if constexpr (kStagesSegments<C>) find_segments();
    QueryStep step = QueryStep::first(walk, step_use);
    const int32_t end = step.number + walk.steps();
    const auto sum_of = [&] {
      const int32_t sum = step.head * grid.sums.tiles + step.tile;
      if constexpr (kMayOrder<C>)
        if (tile().starts_sums(step.tile)) return ~sum;
      return sum;
    };
    int32_t listed = 0;
    if constexpr (C::kDrawsAhead) draw_kept(*this, step);
    int32_t sum_before;
    if constexpr (kSkipsBlocks<C>) {
      sum_before = run_steps_by_blocks(*this, walk, step, sum_of);
    } else {
      run_step<true>(step, walk, 0, listed);
      sum_before = sum_of();  // of the step that a list gives
      step.advance(walk);
#pragma unroll 1
      for (; step.number < end; step.advance(walk)) {
        run_step<false>(step, walk, sum_before, listed);
        sum_before = sum_of();
      }
    }
    step_use = ptx::here(step.number);
    shared.release_values(tile_index);
    if constexpr (C::kKeepsSums) fetch_sums(*this, sum_before);
    start_dq(step_use - 1, listed);
    finish_dq<0>(step_use - 1, sum_before);
  }

  __device__ __forceinline__ void run() {
    if (consumer == 1) allow_issue(0);
    run_tiles([this] { differentiate_tile(); });
  }

  // Calls differentiate() for each key tile.
  template <class Differentiate>
  __device__ __forceinline__ void run_tiles(Differentiate differentiate) {
    for (;; ++tile_index) {
      shared.state_pipe.wait_full(tile_index);
      if (uniform(tile().done)) return;
      dk.clear();
      dv.clear();
      shared.key_pipe.wait_full(tile_index);
      if constexpr (C::kValuesApart) shared.value_pipe.wait_full(tile_index);
      if constexpr (C::kStoresDq) clear_unseen_dq(*this);
      differentiate();
      if constexpr (C::kRoundsDq) ptx::release_to_cluster();  // dQ is added, by this CTA's one tile
      shared.key_pipe.release(tile_index);
      if constexpr (C::Score::kDropout || C::Score::kWeightScale != 1) {  // dV ← dV / (1 − rate)
        const float factor = (C::Score::kDropout ? dropout_scale(p.spec) : 1.0f) / C::Score::kWeightScale;
        for_each(dv, [&](float& x, int, int, int) { x *= factor; });
      }
      const bool in_floats = grid.head_parts > 1;
      const int32_t used = tile().work.tile.used_keys() - key();
      clear_rows_from(used, dv);  // P = 0 past a length, but an infinite row of dO makes NaN of it
      store_gradient_rows(dv, tile().dvalue, key(), tile().work.tile.end, in_floats);
      const float dk_factor = p.spec.scale * (C::kOmitsDropoutScale ? dropout_scale(p.spec) : 1);
      for_each(dk, [&](float& x, int, int, int) { x *= dk_factor; });  // dK ← scale · dK
      clear_rows_from(used, dk);
      store_gradient_rows(dk, tile().dkey, key(), tile().work.tile.end, in_floats);
      shared.state_pipe.release(tile_index);
    }
  }
};

}  // namespace jax_flash
