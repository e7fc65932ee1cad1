// dK and dV for cases in which shared memory has no room for both Q and dO: they share one buffer, and Q is
// loaded a second time after dO. This happens in float32, at d = 256 in the 64 KB of sm_75, and at d = 512 in
// 99 KB.
#pragma once

#include "cuda/backward/keys.cuh"

namespace jax_flash::inline JF_ARCH_NAMESPACE {

// Loads lse [M] and delta [M] of a step. Unused rows get an lse that makes P = 0.
template <class C>
__device__ __forceinline__ void load_statistics(const Problem& p, const KeyBlockStateOf<C>& block,
                                                const QueryStep& step, float* statistics) {
  const int32_t i = static_cast<int32_t>(threadIdx.x);
  if (i >= C::kM) return;
  const int64_t row = step.tile * C::kM + i;
  const bool used = block.rows.lo <= row && row < block.rows.hi;
  statistics[i] = used ? block.lse[step.head * p.lse.head + row * p.lse.row] : INFINITY;
  statistics[C::kM + i] = used ? block.delta[step.head * p.delta.head + row * p.delta.row] : 0;
}

template <class C>
__device__ __forceinline__ void backward_keys_single_buffer(const Problem& p, KeyBlockStateOf<C>& block,
                                                            int32_t sum_tiles, uint8_t* shared) {
  using T = typename C::Element;
  using QTile = typename C::QTile;
  using DoTile = typename C::DoTile;
  using KTile = typename C::KTile;
  using VTile = typename C::VTile;
  using PTile = typename C::PTile;
  constexpr BackwardLayout kLayout = C::kLayout;
  const TileWork& tile = block.work.tile;
  const WarpPartition<C> at;
  const uint32_t k = ptx::shared_address(shared), v = k + kLayout.v, buffer = k + kLayout.queries,
                 p_tile = k + kLayout.p, ds_tile = k + kLayout.ds;
  auto* const statistics = reinterpret_cast<float*>(shared + kLayout.queries + kLayout.lse);
  const SharedStatistics<typename C::S, C::kM> rows{statistics + at.s.row};

  typename C::DK dk;
  typename C::DV dv;
  dk.clear(), dv.clear();
  const int32_t heads = p.heads / p.kv_heads;
  QueryStep step = first_shown<C>(p, block, heads);
  // Without a step no copy starts, because none may be in flight when dK and dV are stored.
  if (!block.tiles.empty() && step.head < heads) {
    load_tile<KTile, C::kThreads>(k, block.key, tile.row, tile.used_keys());
    load_tile<VTile, C::kThreads>(v, block.value, tile.row, tile.used_keys());
  }
  for (; !block.tiles.empty() && step.head < heads; advance_shown<C>(p, block, heads, step)) {
    const int32_t row = step.tile * C::kM, first = row + at.s.row, key = tile.row + at.s.column;
    const bool partial = row < block.whole.lo || row + C::kM > block.whole.hi;
    // Rows that see no key become zeros, because they may hold NaN or infinities and 0 · NaN is NaN.
    auto used = [=](int i, int r) { return fabsf(statistics[i + r]) != INFINITY; };
    auto load_and_wait = [&]<class Tile>(Tile, GlobalRows<const T> from, const View& view) {
      from.data += step.head * view.head;
      __syncthreads();  // every warp has read the tile in the buffer
      load_tile_where<Tile, C::kThreads>(buffer, from, row, used);
      ptx::cp_async_commit();
      ptx::cp_async_wait<0>();
      __syncthreads();
    };
    __syncthreads();  // every warp has finished the last step
    load_statistics<C>(p, block, step, statistics);
    if constexpr (!C::kPlain) {
      if (threadIdx.x == 0 && step.head > 0) prepare_score<C>(p, block, step.head);
    }

    typename C::S s, dp;
    load_and_wait(QTile{}, block.query, p.query);
    if (at.computes_s) mma_qk<QTile, KTile>(s, buffer, at.s.row, k, at.s.column);  // S = Q Kᵀ  [M, N]
    load_and_wait(DoTile{}, block.dout, p.dout);
    if (at.computes_s) {
      mma_qk<DoTile, VTile>(dp, buffer, at.s.row, v, at.s.column);  // dP = dO Vᵀ  [M, N]
      typename C::Score score;                                      // P = exp(S − lse), dS = P ∘ (dP − delta)
      const ScoreTile<typename C::Element, decltype(block.score)> scores{p, block.score, block.band, first,
                                                                         key};
      score.prefetch_gradient(scores);
      tile_gradient(score, scores, rows, partial, s, dp);
      store_accumulator<PTile>(s, shared + kLayout.p, at.s);
      store_accumulator<PTile>(dp, shared + kLayout.ds, at.s);
    }
    __syncthreads();
    add_transposed_product<C, typename C::DoSlice>(dv, p_tile, buffer + slice_offset<C, DoTile>(),
                                                   at.dk);  // dV += Pᵀ dO
    load_and_wait(QTile{}, block.query, p.query);
    add_transposed_product<C, typename C::QSlice>(dk, ds_tile, buffer + slice_offset<C, QTile>(),
                                                  at.dk);  // dK += dSᵀ Q
    if (block.sums) {
      typename C::DQ dq;
      multiply_ds_k<C>(dq, ds_tile, k, at.dq);  // dQ = dS K
      add_dq<C>(p, block, sum_tiles, step, dq, at.dq);
    }
  }
  store_dk_dv<C>(p, block, shared, dk, dv);  // dK ← scale · dK
}

}  // namespace jax_flash::inline JF_ARCH_NAMESPACE
