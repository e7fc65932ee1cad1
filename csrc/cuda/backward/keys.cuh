// dK and dV: one thread block per key tile and KV head, which iterates over the query tiles of the KV head's
// query heads. dQ is added to float32 sums in global memory on the way, unless the tile has all keys and dQ
// is complete, or the call is deterministic and another kernel computes it.
#pragma once

#include <algorithm>

#include "core/plan/launch_plan.h"
#include "cuda/backward/keys_load.cuh"
#include "cuda/backward/keys_traits.cuh"
#include "cuda/epilogue.cuh"
#include "cuda/gradient.cuh"
#include "cuda/launch.h"
#include "cuda/ptx/shared.cuh"
#include "cuda/registry.h"
#include "cuda/slices.cuh"
#include "cuda/tile/fragments.cuh"

namespace jax_flash::inline JF_ARCH_NAMESPACE {

// Computes this warp's part of P (in s) and of dS (in dp). statistics: the step's lse and delta; q, d_out, k:
// tiles.
template <class C>
__device__ __forceinline__ void score_gradients(const Problem& p, const KeyBlockStateOf<C>& block,
                                                const QueryStep& step, const WarpPartition<C>& at,
                                                const float* statistics, uint32_t q, uint32_t d_out,
                                                uint32_t k, typename C::S& s, typename C::S& dp) {
  const SharedStatistics<typename C::S, C::kM> rows{statistics + at.s.row};
  const int32_t row = step.tile * C::kM, first = row + at.s.row, key = block.work.tile.row + at.s.column;
  const bool partial = row < block.whole.lo || row + C::kM > block.whole.hi;
  auto multiply_q_k = [&] {  // S = Q Kᵀ  [M, N]
    mma_qk<typename C::QTile, typename C::KTile>(s, q, at.s.row, k, at.s.column);
  };
  auto multiply_do_v = [&] {  // dP = dO Vᵀ  [M, N]
    mma_qk<typename C::DoTile, typename C::VTile>(dp, d_out, at.s.row, k + C::kLayout.v, at.s.column);
  };
  if constexpr (!C::kPlain) {
    typename C::Score score;
    const ScoreTile<typename C::Element, decltype(block.score)> tile{p, block.score, block.band, first, key};
    score.prefetch(tile, key);
    multiply_q_k();
    multiply_do_v();
    score.prefetch_gradient(tile);
    tile_gradient(score, tile, rows, partial, s, dp);
  } else {  // P comes before dP, so the compiler may overlap the two
    multiply_q_k();
    if (partial) mask(s, block.band, first, key);
    probabilities(s, rows, C::Score::power_scale(p.spec));  // P = exp(S − lse)
    multiply_do_v();
    for_each(dp, [&](float& x, int slot, int n, int e) {  // dS = P ∘ (dP − delta)
      x = s.at(slot, n, e) * (x - rows.delta(slot));
    });
  }
}

// d += Aᵀ B for this warp's keys: A [M, N] is P or dS, B is dO [M, dv] or Q [M, d].
template <class C, class BTile, class D>
__device__ __forceinline__ void add_transposed_product(D& d, uint32_t a, uint32_t b, Placement at) {
  using T = typename C::Element;
  multiply_add<T, C::kM / kStepK<T>>(d, ColumnsA<typename C::PTile, 16>(a, at.row),
                                     ColumnsB<BTile, 16 * C::kGroupWarps>(b, at.column));
}

// dQ = dS K  [M, d]
template <class C>
__device__ __forceinline__ void multiply_ds_k(typename C::DQ& dq, uint32_t ds, uint32_t k, Placement at) {
  using T = typename C::Element;
  dq.clear();
  multiply_add<T, C::kN / kStepK<T>>(dq, RowsA<typename C::PTile>(ds, at.row),
                                     ColumnsB<typename C::KSlice, 16 * C::kDqColumns, false>(
                                         k + slice_offset<C, typename C::KTile>(), at.column));
}

// Adds a step's dQ to the sums. `tiles`: query tiles per head.
template <class C>
__device__ __forceinline__ void add_dq(const Problem& p, const KeyBlockStateOf<C>& block, int32_t tiles,
                                       const QueryStep& step, const typename C::DQ& dq, Placement at) {
  at.column += first_column<C>();
  add_to_sums<C::kM>(sum_tile<C::kM>(p, block.sums, step.head * tiles + step.tile), p.head_dim, dq, at);
}

// Stores a step's dQ, the sum over all keys: 0 in rows that see none, for which 0 · V may be NaN. `lse`: of
// the step's rows.
template <class C>
__device__ __forceinline__ void store_dq(const Problem& p, const KeyBlockStateOf<C>& block,
                                         const QueryStep& step, const float* lse, const typename C::DQ& dq,
                                         const Placement& at) {
  using T = typename C::Element;
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int slot = 0; slot < C::DQ::kSlots; ++slot) {
    const int32_t in_tile = at.row + slot / 2 * at.row_step + slot % 2 * 8 + lane / 4;
    const int32_t row = step.tile * C::kM + in_tile;
    const bool sees = block.rows.contains(row) && lse[in_tile] != -INFINITY;
    T* const to = block.dquery + step.head * p.dquery.head + row * p.dquery.row;
#pragma unroll
    for (int n = 0; n < C::DQ::kColumnTiles; ++n) {
      const int32_t column = at.column + n / 2 * at.column_step + n % 2 * 8 + lane % 4 * 2;
      if (row < p.q_rows && column < p.head_dim)
        ptx::store_pair(to + column, sees ? dq.at(slot, n, 0) * p.spec.scale : 0,
                        sees ? dq.at(slot, n, 1) * p.spec.scale : 0);
    }
  }
}

// Scales dK and dV and writes them, through the shared memory of K and V.
template <class C>
__device__ __forceinline__ void store_dk_dv(const Problem& p, const KeyBlockStateOf<C>& block,
                                            uint8_t* shared, typename C::DK& dk, typename C::DV& dv) {
  using K = typename C::KSlice;
  using V = typename C::VSlice;
  const TileWork& tile = block.work.tile;
  const float dv_factor = C::Score::kDropout ? dropout_scale(p.spec) : 1.0f;
  for_each(dk, [&](float& x, int, int, int) { x *= p.spec.scale; });
  for_each(dv, [&](float& x, int, int, int) { x *= dv_factor; });
  __syncthreads();  // every warp has read K and V
  // Computed again, because the loop has no register to keep it in.
  const Placement dk_at = WarpPartition<C>().dk;
  store_accumulator<K>(dk, shared, dk_at);
  store_accumulator<V>(dv, shared + C::kLayout.v, dk_at);
  __syncthreads();
  // P = 0 past a length, but an infinite row of Q or dO makes NaN of it.
  const int32_t used = tile.used_keys(), thread = ptx::thread_index();
  store_tile<K, C::kN, C::kThreads>(shared, 0, block.dkey, tile.row, used, tile.end, thread);
  store_tile<V, C::kN, C::kThreads>(shared + C::kLayout.v, 0, block.dvalue, tile.row, used, tile.end, thread);
}

// Finds the score operands of a head of the group.
template <class C>
__device__ __forceinline__ void prepare_score(const Problem& p, KeyBlockStateOf<C>& block, int32_t head) {
  block.score.template prepare<typename C::Score>(p, block.work, block.work.head + head);
  block.score.move_tiles(head - block.score_head);
  block.score_head = head;
}

// For kernels with score options, between a step's copies and its products: zeros unseen rows and, if the
// head changes, prepares its score.
template <class C>
__device__ __forceinline__ void prepare_step(const Problem& p, KeyBlockStateOf<C>& block,
                                             const QueryStep& step, uint8_t* q, const float* statistics) {
  clear_unseen<C>(q, statistics);
  // clear_unseen contains a __syncthreads, so every thread is done with the last head's block.score.
  bool new_head = step.head > 0 && step.tile == block.tiles.lo;
  if constexpr (C::Score::reads(Operand::kBlockMask)) {
    new_head = step.head != block.score_head;  // compares heads, because a head's first tiles may be hidden
    if (new_head) __syncthreads();             // every thread has compared the heads
  }
  if (new_head) {
    if (threadIdx.x == 0) prepare_score<C>(p, block, step.head);
    __syncthreads();
  }
}

// The main loop. Steps overlap, because a warp waits only for what it needs: the copies of its step; before
// dK and dV, the warps of its group; before dQ, all of dS; and before it stores P and dS, until all warps
// have read those of the last step.
template <class C>
__device__ __forceinline__ void backward_keys(const Problem& p, KeyBlockStateOf<C>& block, int32_t sum_tiles,
                                              uint8_t* shared) {
  using PTile = typename C::PTile;
  constexpr BackwardLayout kLayout = C::kLayout;
  const TileWork& tile = block.work.tile;
  const WarpPartition<C> at;
  const uint32_t k = ptx::shared_address(shared), stages = k + kLayout.queries, p_tile = k + kLayout.p,
                 ds_tile = k + kLayout.ds;
  const KeyBarriers<C> barriers(k + kLayout.barriers);
  const int32_t heads = p.heads / p.kv_heads;

  typename C::DK dk;
  typename C::DV dv;
  dk.clear(), dv.clear();
  QueryStep step = first_shown<C>(p, block, heads);
  auto load_step = [&](const QueryStep& next) {
    load_queries<C>(p, block, next, stages + next.number % C::kStages * kLayout.stage_bytes);
    barriers.arrive_queries_full(next);
  };
  auto load_next_step = [&] {
    QueryStep next = step;
    advance_shown<C>(p, block, heads, next);
    if (next.head < heads) load_step(next);
  };
  if (!block.tiles.empty() && step.head < heads) {
    load_tile<typename C::KTile, C::kThreads>(k, block.key, tile.row, tile.used_keys());
    load_tile<typename C::VTile, C::kThreads>(k + kLayout.v, block.value, tile.row, tile.used_keys());
    load_step(step);
  }
  for (; !block.tiles.empty() && step.head < heads; advance_shown<C>(p, block, heads, step)) {
    const int stage = step.number % C::kStages, begin = kLayout.queries + stage * kLayout.stage_bytes;
    const uint32_t q = k + begin, d_out = q + kLayout.d_out;
    const auto* statistics = reinterpret_cast<const float*>(shared + begin + kLayout.lse);
    barriers.wait_queries_full(step);
    if constexpr (!C::kPlain) prepare_step<C>(p, block, step, shared + begin, statistics);

    typename C::S s, dp;
    if (at.computes_s)  // P = exp(S − lse), dS = P ∘ (dP − delta)
      score_gradients<C>(p, block, step, at, statistics, q, d_out, k, s, dp);
    barriers.wait_ds_empty(step.number - 1);
    if (at.computes_s) {
      store_accumulator<PTile>(s, shared + kLayout.p, at.s);
      store_accumulator<PTile>(dp, shared + kLayout.ds, at.s);
    }
    barriers.arrive_ds_full();
    if constexpr (C::kStages == 2) load_next_step();
    ptx::sync_group(1 + at.group, 32 * C::kGroupWarps);

    add_transposed_product<C, typename C::DoSlice>(dv, p_tile, d_out + slice_offset<C, typename C::DoTile>(),
                                                   at.dk);  // dV += Pᵀ dO
    add_transposed_product<C, typename C::QSlice>(dk, ds_tile, q + slice_offset<C, typename C::QTile>(),
                                                  at.dk);  // dK += dSᵀ Q
    barriers.wait_ds_full(step);
    if constexpr (C::kOneTile) {
      typename C::DQ dq;
      multiply_ds_k<C>(dq, ds_tile, k, at.dq);  // dQ = dS K
      store_dq<C>(p, block, step, statistics, dq, at.dq);
      barriers.arrive_ds_empty();  // lse, too, has been read
    } else if (block.sums) {
      typename C::DQ dq;
      multiply_ds_k<C>(dq, ds_tile, k, at.dq);  // dQ = dS K
      barriers.arrive_ds_empty();
      add_dq<C>(p, block, sum_tiles, step, dq, at.dq);
    } else {
      barriers.arrive_ds_empty();
    }
    if constexpr (C::kStages == 1) {
      barriers.wait_ds_empty(step.number);
      load_next_step();
    }
  }
  store_dk_dv<C>(p, block, shared, dk, dv);  // dK ← scale · dK
}

// The main loop for rows in which Q and dO share one buffer (backward/keys_single_buffer.cuh).
template <class C>
__device__ __forceinline__ void backward_keys_single_buffer(const Problem& p, KeyBlockStateOf<C>& block,
                                                            int32_t sum_tiles, uint8_t* shared);

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocks)
    backward_keys_sm80(const __grid_constant__ Problem p, const __grid_constant__ GridTiles grid,
                       const __grid_constant__ QuerySums sums) {
  using Block = KeyBlockStateOf<C>;
  static_assert(sizeof(Block) + C::kLayout.bytes - C::kLayout.barriers <= kBlockStateBytes);
  __shared__ Block block;
  uint8_t* const shared = ptx::dynamic_shared();
  if (threadIdx.x == 0) {
    block.template prepare<C::kM>(p, grid, C::kN, sums, first_column<C>());
    if constexpr (C::kOneTile) block.take_all_queries(p, C::kM);
    if constexpr (!C::kPlain) prepare_score<C>(p, block, 0);
    KeyBarriers<C>(ptx::shared_address(shared + C::kLayout.barriers)).init();
  }
  __syncthreads();
  if (block.work.tile.row >= block.work.tile.end) return;
  if constexpr (C::kSingleBuffer) {
    backward_keys_single_buffer<C>(p, block, sums.tiles, shared);
  } else {
    backward_keys<C>(p, block, sums.tiles, shared);
  }
}

template <class C>
cudaError_t launch_backward_keys(const Problem& p, const TileGrid& grid, void* workspace,
                                 const QuerySums& sums, cudaStream_t stream) {
  const int32_t slices = slice_count<C>(std::max(p.head_dim, p.value_dim));
  return launch(backward_keys_sm80<C>, {grid.blocks, slices}, C::kThreads, C::kSharedBytes, stream, p,
                grid_tiles(p, grid, workspace), sums);
}

}  // namespace jax_flash::inline JF_ARCH_NAMESPACE
