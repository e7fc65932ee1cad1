// dK and dV where shared memory has no room for Q beside dO: each comes in its turn, Q a second time after
// dO. float32 at d = 256 in sm_75's 64 KB.
#pragma once

#include "cuda/backward/keys.cuh"

namespace jax_flash::inline JF_FAMILY {

// lse [kM] and delta [kM] of a step, which unused rows make P = 0 with.
template <class C>
__device__ __forceinline__ void load_statistics(const Problem& p,
                                                const KeyBlockState<typename C::Element>& block,
                                                const QueryStep& step, float* statistics) {
  const int32_t i = static_cast<int32_t>(threadIdx.x);
  if (i >= C::kM) return;
  const int64_t row = step.tile * C::kM + i;
  const bool used = block.rows.lo <= row && row < block.rows.hi;
  statistics[i] = used ? block.lse[step.head * p.lse.head + row * p.lse.row] : INFINITY;
  statistics[C::kM + i] = used ? block.delta[step.head * p.delta.head + row * p.delta.row] : 0;
}

template <class C>
__device__ __forceinline__ void backward_keys_in_turn(const Problem& p,
                                                      KeyBlockState<typename C::Element>& block,
                                                      uint8_t* shared) {
  using T = typename C::Element;
  using QTile = typename C::QTile;
  using DoTile = typename C::DoTile;
  using KTile = typename C::KTile;
  using VTile = typename C::VTile;
  using PTile = typename C::PTile;
  const TileWork& tile = block.work.tile;
  const WarpPlaces<C> at;
  const uint32_t k = ptx::shared_address(shared), v = k + KTile::kBytes, place = k + C::kKeyBytes,
                 p_tile = k + C::kPBegin, ds_tile = p_tile + PTile::kBytes;
  auto* const statistics = reinterpret_cast<float*>(shared + C::kKeyBytes + C::kQueryBytes);
  const SharedStatistics<typename C::S, C::kM> rows{statistics + at.s.row};

  typename C::DK dk;
  typename C::DV dv;
  dk.clear();
  dv.clear();
  load_tile<KTile, C::kThreads>(k, block.key, tile.row, tile.used_keys());
  load_tile<VTile, C::kThreads>(v, block.value, tile.row, tile.used_keys());
  QueryStep step{0, block.tiles.lo};
  for (; !block.tiles.empty() && step.head < p.heads / p.kv_heads; step.advance(block.tiles)) {
    const int32_t row = step.tile * C::kM, first = row + at.s.row, key = tile.row + at.s.column;
    const bool partial = row < block.whole.lo || row + C::kM > block.whole.hi;
    // Rows that see nothing are zero: they may hold anything, and 0 · NaN is NaN.
    auto used = [=](int i, int r) { return fabsf(statistics[i + r]) != INFINITY; };
    auto bring = [&]<class Tile>(Tile, GlobalRows<const T> from, const View& view) {
      from.data += step.head * view.head;
      __syncthreads();  // everyone has left what the place held
      load_tile_where<Tile, C::kThreads>(place, from, row, used);
      ptx::cp_async_commit();
      ptx::cp_async_wait<0>();
      __syncthreads();
    };
    __syncthreads();  // everyone has left the step before
    load_statistics<C>(p, block, step, statistics);
    if constexpr (C::kGeneral) {
      if (threadIdx.x == 0 && step.head > 0) block.score.prepare(p, block.work, block.work.head + step.head);
    }

    typename C::S s, dp;
    bring(QTile{}, block.query, p.query);
    if (at.makes_s) mma_qk<QTile, KTile>(s, place, at.s.row, k, at.s.column);  // S = Q Kᵀ  [M, N]
    bring(DoTile{}, block.dout, p.dout);
    if (at.makes_s) {
      mma_qk<DoTile, VTile>(dp, place, at.s.row, v, at.s.column);  // dP = dO Vᵀ  [M, N]
      tile_gradient<C::kGeneral, true>(p, block.score, block.band, rows, first, key, partial, s, dp);
      store_accumulator<PTile>(s, shared + C::kPBegin, at.s);
      store_accumulator<PTile>(dp, shared + C::kPBegin + PTile::kBytes, at.s);
    }
    __syncthreads();
    multiply_add<T, C::kM / kStepK<T>>(
        dv, ColumnsA<PTile, 16>(p_tile, at.dk.row),
        ColumnsB<DoTile, 16 * C::kWidthWarps>(place, at.dk.column));  // dV += Pᵀ dO
    bring(QTile{}, block.query, p.query);
    multiply_add<T, C::kM / kStepK<T>>(
        dk, ColumnsA<PTile, 16>(ds_tile, at.dk.row),
        ColumnsB<QTile, 16 * C::kWidthWarps>(place, at.dk.column));  // dK += dSᵀ Q
    if (block.dquery) {
      typename C::DQ dq;
      dq.clear();
      multiply_add<T, C::kN / kStepK<T>>(
          dq, RowsA<PTile>(ds_tile, at.dq.row),
          ColumnsB<KTile, 16 * C::kDqColumns, false>(k, at.dq.column));  // dQ = dS K
      add_queries<C>(p, block, step, dq, at.dq);
    }
  }
  store_keys<C>(p, block, shared, dk, dv);
}

}  // namespace jax_flash::inline JF_FAMILY
