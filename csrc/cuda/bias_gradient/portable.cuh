// The portable bias gradient, which runs on sm_75 and every newer card: dbias is dS summed over the
// dimensions that the bias is broadcast over. Each thread block owns one tile of dbias and iterates over all
// tiles of dS that it sums, so no two blocks write the same element and the result is deterministic.
#pragma once

#include "core/families/portable_layout.h"
#include "core/plan/launch_plan.h"
#include "cuda/bias_gradient/batch_parts.cuh"
#include "cuda/bias_gradient/bias_tile.cuh"
#include "cuda/gradient.cuh"
#include "cuda/launch.h"
#include "cuda/ptx/shared.cuh"
#include "cuda/registry.h"
#include "cuda/score/general.cuh"
#include "cuda/tile/copy.cuh"
#include "cuda/tile/fragments.cuh"

namespace jax_flash::inline JF_ARCH_NAMESPACE {

// A row of csrc/kernels.def. Each warp owns 16 query rows.
template <class T, Row R>
struct BiasGradientSm80 {
  using Element = T;
  static constexpr int kHeadDim = R.head_dim, kValueDim = R.value_dim, kM = R.block_m, kN = R.block_n;
  static constexpr int kWarps = R.warps, kThreads = kWarps * 32, kBlocks = R.blocks;
  using QTile = SharedTile<T, kM, kHeadDim>;
  using DoTile = SharedTile<T, kM, kValueDim>;
  using KTile = SharedTile<T, kN, kHeadDim>;
  using VTile = SharedTile<T, kN, kValueDim>;
  using S = Accumulator<1, kN / 8>;
  using Score = GeneralDropoutScore<S>;
  static constexpr bool kSingleBuffer = R.stages == 0;  // dO and V replace Q and K
  static constexpr BiasGradientLayout kLayout = bias_gradient_layout(R, sizeof(T));
  static constexpr int kSharedBytes = kLayout.bytes;
  static_assert(kLayout.k == QTile::kBytes && kLayout.v - kLayout.d_out == DoTile::kBytes &&
                kLayout.v + VTile::kBytes <= kLayout.bytes && kLayout.k + KTile::kBytes <= kLayout.bytes);
  static_assert(kM == 16 * kWarps && R.stages <= 1);
  static_assert(kLayout.sum + kM * kN * int32_t{sizeof(float)} <= kLayout.bytes);
  static_assert(sizeof(ScoreOperands) <= kBlockStateBytes);
};

// One batch entry and head, for which a tile of dS is computed.
struct HeadContext {
  const Problem& p;
  const BlockWork& work;
  const Band& band;
  const ScoreOperands& score;
  int32_t head;
};

// sum += dS [M, N], for the queries from `row` on and the keys from `key` on.
template <class C>
__device__ __forceinline__ void add_tile(const HeadContext& at, int32_t row, int32_t key, uint32_t shared,
                                         typename C::S& sum) {
  using T = typename C::Element;
  const Problem& p = at.p;
  const TileWork& lengths = at.work.tile;
  const uint32_t q = shared, k = shared + C::kLayout.k, d_out = shared + C::kLayout.d_out,
                 v = shared + C::kLayout.v;
  const int32_t kv_head = p.kv_head(at.head), warp_row = static_cast<int>(threadIdx.x) / 32 * 16;
  auto rows_of = [&](const View& view, int32_t head, int32_t columns) {
    return GlobalRows<const T>{view.as<const T>() + at.work.offset(p, view, head, 0), view.row, columns};
  };
  __syncthreads();  // every warp has read the tiles in shared memory
  auto load_dout_value = [&] {
    load_tile<typename C::DoTile, C::kThreads>(d_out, rows_of(p.dout, at.head, p.value_dim), row,
                                               lengths.q_len);
    load_tile<typename C::VTile, C::kThreads>(v, rows_of(p.value, kv_head, p.value_dim), key, lengths.k_len);
  };
  load_tile<typename C::QTile, C::kThreads>(q, rows_of(p.query, at.head, p.head_dim), row, lengths.q_len);
  load_tile<typename C::KTile, C::kThreads>(k, rows_of(p.key, kv_head, p.head_dim), key, lengths.k_len);
  if constexpr (!C::kSingleBuffer) load_dout_value();
  ptx::cp_async_commit();
  const RowStatistics<typename C::S> rows(p, p.lse.as<const float>() + at.work.offset(p, p.lse, at.head, 0),
                                          p.delta.as<const float>() + at.work.offset(p, p.delta, at.head, 0),
                                          row + warp_row, lengths.q_len);
  ptx::cp_async_wait<0>();
  __syncthreads();

  typename C::S s, dp;
  mma_qk<typename C::QTile, typename C::KTile>(s, q, warp_row, k);  // S = Q Kᵀ  [M, N]
  if constexpr (C::kSingleBuffer) {
    __syncthreads();
    load_dout_value();
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
  }
  mma_qk<typename C::DoTile, typename C::VTile>(dp, d_out, warp_row, v);  // dP = dO Vᵀ  [M, N]
  rows.clear_unseen(s, dp);
  const bool partial = at.band.classify(row, row + C::kM, key, key + C::kN) != TileClass::kFull;
  typename C::Score score;
  const ScoreTile<typename C::Element, decltype(at.score)> tile{p, at.score, at.band, row + warp_row, key};
  score.prefetch_gradient(tile);
  tile_gradient<GradientOf::kBias>(score, tile, rows, partial, s, dp);  // dS = P ∘ (dP − delta)
  for_each(sum, [&](float& x, int slot, int n, int e) { x += dp.at(slot, n, e); });
}

// The sum of all tiles of dS that belong to the block's tile of dbias: [M, N], not yet summed over rows or
// columns. `segments`: the visible keys of each query tile of a batch entry, or null.
template <class C>
__device__ __forceinline__ void sum_tiles(const Problem& p, const BiasTile& own, const Interval* segments,
                                          uint32_t shared, typename C::S& sum) {
  const auto q_tiles = static_cast<int32_t>(ceil_div(p.q_rows, C::kM));
  __shared__ ScoreOperands score;
  for (int32_t b = own.batch.lo; b < own.batch.hi; ++b) {
    const Sequence s = fixed_sequence(p, own.leading, b);
    BlockWork work{own.leading, 0, b, {s.index, 0, 0, s.q_len, s.k_len, 0, 0, 0}};
    const Band band = work.band(p);
    for (int32_t h = own.heads.lo; h < own.heads.hi; ++h) {
      __syncthreads();  // every thread has read the last head's score
      if (threadIdx.x == 0) score.template prepare<typename C::Score>(p, work, h);
      for (int32_t i = own.row_tiles.lo; i < own.row_tiles.hi; ++i) {
        const int32_t row = work.tile.row = i * C::kM;
        const Interval keys = trim_to_segments<Over::kQueries, true>(segments, q_tiles, C::kM, p, work,
                                                                     band.rows(row, row + C::kM))
                                  .any;
        const Interval tiles = intersect(tiles_of(keys, C::kN), own.key_tiles);
        for (int32_t j = tiles.lo; j < tiles.hi; ++j)
          add_tile<C>({p, work, band, score, h}, row, j * C::kN, shared, sum);
      }
    }
  }
}

// Sums over rows or columns if dbias has only one of them, and writes the tile.
template <class B, class C>
__device__ __forceinline__ void store_bias_tile(const Problem& p, const BiasTile& own, const float* sums) {
  const int32_t rows = min(C::kM, p.dbias_rows - own.row), columns = min(C::kN, p.dbias_columns - own.column);
  const int32_t summed_rows = p.dbias_rows == 1 ? C::kM : 1,
                summed_columns = p.dbias_columns == 1 ? C::kN : 1;
  B* to = p.dbias.as<B>() + p.dbias.leading_offset(p.leading, own.leading) +
          p.dbias.offset(own.b, own.h, own.row, own.column);
  for (int32_t at = static_cast<int32_t>(threadIdx.x); at < rows * columns; at += C::kThreads) {
    const int32_t r = at / columns, c = at % columns;
    float total = 0;
    for (int32_t i = 0; i < summed_rows; ++i) {
      for (int32_t j = 0; j < summed_columns; ++j) total += sums[(r + i) * C::kN + c + j];
    }
    to[r * p.dbias.row + c * p.dbias.column] = B(total);
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocks)
    bias_gradient_sm80(const __grid_constant__ Problem p, const Interval* segments, int32_t rows,
                       int32_t columns, DType result) {
  uint8_t* const shared = ptx::dynamic_shared();
  const BiasTile own(p, blockIdx.x, rows, columns, C::kM, C::kN);
  typename C::S sum;
  sum.clear();
  sum_tiles<C>(p, own, segments, ptx::shared_address(shared), sum);

  auto* sums = reinterpret_cast<float*>(shared + C::kLayout.sum);  // [M, N]
  const int32_t warp_row = static_cast<int>(threadIdx.x) / 32 * 16;
  __syncthreads();  // every warp has read the last tiles
  for_each(sum, [&](float& x, int slot, int n, int e) {
    sums[(warp_row + C::S::row(slot)) * C::kN + C::S::column(n) + e] = x;
  });
  __syncthreads();
  if (result == DType::kF32) {
    store_bias_tile<float32, C>(p, own, sums);
  } else if (result == DType::kF16) {
    store_bias_tile<float16, C>(p, own, sums);
  } else {
    store_bias_tile<bfloat16, C>(p, own, sums);
  }
}

template <class C>
cudaError_t launch_bias_gradient_sm80(const Problem& p, const LaunchPlan& plan, void* workspace,
                                      cudaStream_t stream) {
  const cudaError_t e =
      launch(bias_gradient_sm80<C>, plan.queries.blocks, C::kThreads, C::kSharedBytes, stream,
             with_batch_parts(p, plan, workspace), segments_of(plan.queries, workspace),
             static_cast<int32_t>(plan.queries.tiles), static_cast<int32_t>(plan.keys.tiles),
             plan.parts > 1 ? DType::kF32 : p.bias_dtype);
  return e == cudaSuccess ? add_batch_parts(p, plan, workspace, stream) : e;
}

template <class T, Row R>
cudaError_t launch_row(const Problem& p, const LaunchPlan& plan, void* workspace, cudaStream_t stream) {
  return launch_bias_gradient_sm80<BiasGradientSm80<T, R>>(p, plan, workspace, stream);
}

}  // namespace jax_flash::inline JF_ARCH_NAMESPACE
