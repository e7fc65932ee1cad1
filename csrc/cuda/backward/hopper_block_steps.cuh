// Steps of cuda/backward/hopper.cuh in which some block of 64 rows sees none of a consumer's keys. A step has
// one or two blocks. Beside the edge of a band, every consumer has such a step. The loop of the other steps
// has no branch for these: with one it would be 2 to 7 % slower.
#pragma once

#include <cstdint>

#include "cuda/backward/hopper_state.cuh"
#include "cuda/backward/hopper_step.cuh"
#include "cuda/backward/query_step.cuh"
#include "cuda/hopper/roles.cuh"
#include "cuda/mask.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/stmatrix.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/tile/accumulator.cuh"

namespace jax_flash {

template <class C>
inline constexpr int kBlocks = C::kM / kConsumerRows;

// The number of steps, from `step` on, in which every block sees some of the consumer's keys.
template <class Consumer>
__device__ __forceinline__ int32_t whole_steps(const Consumer& of, const QueryWalk& walk,
                                               const QueryStep& step) {
  constexpr int kOfStep = kBlocks<typename Consumer::Config>;
  const Interval blocks = uniform(of.tile().blocks.seen[of.consumer]);
  const Interval seen{(blocks.lo + kOfStep - 1) / kOfStep, blocks.hi / kOfStep};
  if (!seen.contains(step.tile)) return 0;
  if (seen.lo <= walk.tiles.lo && walk.tiles.hi <= seen.hi) return walk.steps();
  const int32_t tiles = walk.tiles_left(seen, step.tile);
  return walk.heads_inner ? tiles * walk.heads - step.head : tiles;
}

// Stores dSᵀ of one of a step's two blocks, and zeros for the other, because dQ has the dS of both consumers.
template <class Consumer>
__device__ __forceinline__ void share_block(Consumer& of, uint32_t use, int block) {
  using C = typename Consumer::Config;
  using DsTile = typename C::DsTile;
  constexpr uint32_t kZeros[4] = {};
  static_assert(DsTile::kPanel * 8 == kConsumerRows);  // a panel has the rows of a block
  const LaneAddress<DsTile> to = empty_ds(of, use);
#pragma unroll
  for (int k = 0; k < kConsumerRows / 16; ++k) {
    ptx::stmatrix_x4(to.at(0, 2 * k) + block * DsTile::kPanelBytes, of.dst.x[0][k]);
    ptx::stmatrix_x4(to.at(0, 2 * k) + (1 - block) * DsTile::kPanelBytes, kZeros);
  }
  ptx::fence_async_shared();
  of.shared.ds_pipe.arrive_by_warp(use);
}

// A step of two blocks, of which one sees some of the consumer's keys. The equations are those of run_step().
template <bool kFirst, class Consumer>
__device__ __forceinline__ void multiply_block(Consumer& of, const QueryStep& step, int block,
                                               int32_t sum_before) {
  using C = typename Consumer::Config;
  using QTile = typename C::QTile;
  using DoTile = typename C::DoTile;
  using Scores = TransposedAccumulator<1, kConsumerRows / 8>;
  auto& shared = of.shared;
  auto &s = reinterpret_cast<Scores&>(of.s), &dp = reinterpret_cast<Scores&>(of.dp);
  const uint32_t use = step.number, stage = use % C::kStages;
  const int first = block * kConsumerRows, row = step.tile * C::kM + first;
  const uint8_t *const q = shared.q[stage] + block * QTile::offset(kConsumerRows, 0),
                       *const d_out = shared.d_out[stage] + block * DoTile::offset(kConsumerRows, 0);
  start_scores<typename C::Element>(s, of.keys(), of.template rows<QTile>(q));          // Sᵀ = K Qᵀ  [64, 64]
  start_scores<typename C::Element>(dp, of.values(), of.template rows<DoTile>(d_out));  // dPᵀ = V dOᵀ
  if constexpr (C::kKeepsSums && !kFirst) fetch_sums(of, sum_before);
  ptx::wgmma_wait<1>();
  ptx::hold(s.x[0]);
  mask(s, of.tile().band, row, of.key());
  of.exponentiate(s, stage, first);  // Pᵀ = exp(Sᵀ − lse)
  ptx::wgmma_wait<0>();
  ptx::hold(dp.x[0]);
  of.differentiate(s, dp, stage, first);  // dSᵀ = Pᵀ ∘ (dPᵀ − delta)
  shared.ready_pipe.release(use);
  of.round(of.pt, s);
  of.round(of.dst, dp);
  share_block(of, use, block);
  ptx::hold(of.pt.x[0]);
  ptx::hold(of.dst.x[0]);
  ptx::hold(of.dv.x[0]);
  ptx::hold(of.dk.x[0]);
  if constexpr (!kFirst) of.start_dq(use - 1, 0);  // dQ = dS K of the step before
  ptx::wgmma_fence();
  of.template start_sum<DoTile, kConsumerRows>(of.dv, of.pt, d_out);  // dV += Pᵀ dO
  of.template start_sum<QTile, kConsumerRows>(of.dk, of.dst, q);      // dK += dSᵀ Q
  if constexpr (!kFirst) of.template finish_dq<2>(use - 1, sum_before);
  ptx::wgmma_wait<1>();
  ptx::hold(of.dv.x[0]);
  ptx::hold(of.pt.x[0]);
  shared.do_pipe.release(use);
  ptx::wgmma_wait<0>();
  ptx::hold(of.dk.x[0]);
  ptx::hold(of.dst.x[0]);
  shared.q_pipe.release(use);
}

// A step in which some block sees none of the consumer's keys.
template <bool kFirst, class Consumer>
__device__ __forceinline__ void run_block_step(Consumer& of, const QueryStep& step, int32_t sum_before) {
  of.shared.ready_pipe.wait_full(step.number);
  if constexpr (kBlocks<typename Consumer::Config> == 2) {
    const Interval seen =
        intersect(uniform(of.tile().blocks.seen[of.consumer]), {step.tile * 2, step.tile * 2 + 2});
    if (!seen.empty()) return multiply_block<kFirst>(of, step, seen.lo % 2, sum_before);
  }
  of.template skip_step<kFirst>(step.number, sum_before, 0);
}

// All steps of a key tile. `sum_of` gives the index of a step's query tile among the sums; returns that of
// the last step. Between the loops the walk is read again from shared memory, because the loops have no
// registers left.
template <class Consumer, class SumOf>
__device__ __forceinline__ int32_t run_steps_by_blocks(Consumer& of, const QueryWalk& walk, QueryStep& step,
                                                       SumOf sum_of) {
  int32_t sum_before = sum_of(), none = 0;
  const bool first_is_whole = whole_steps(of, walk, step) > 0;
  if (!first_is_whole) run_block_step<true>(of, step, 0);
  if (first_is_whole) of.template run_step<true>(step, walk, 0, none);
  step.advance(walk);
  const auto walk_again = [&] { return steps_of(of.tile().walk); };
  const auto end = [&] { return static_cast<int32_t>(of.step_use) + walk_again().steps(); };
  const auto next = [&] { return min(end(), step.number + whole_steps(of, walk_again(), step)); };
#pragma unroll 1
  for (int32_t stop = next();; stop = next()) {
#pragma unroll 1
    for (; step.number < stop; step.advance(walk)) {
      of.template run_step<false>(step, walk, sum_before, none);
      sum_before = sum_of();
    }
    if (stop == end()) return sum_before;
    run_block_step<false>(of, step, sum_before);
    sum_before = sum_of();
    step.advance(walk);
  }
}

}  // namespace jax_flash
