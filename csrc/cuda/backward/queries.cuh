// dQ of deterministic calls: one thread block per query tile and head sums it in a fixed order, at the price
// of computing S and dP a second time.
#pragma once

#include "core/families/portable_layout.h"
#include "core/plan/launch_plan.h"
#include "cuda/epilogue.cuh"
#include "cuda/gradient.cuh"
#include "cuda/launch.h"
#include "cuda/load/dense.cuh"
#include "cuda/load/ring.cuh"
#include "cuda/registry.h"
#include "cuda/score/portable_variants.cuh"
#include "cuda/slices.cuh"
#include "cuda/tile/copy.cuh"
#include "cuda/tile/fragments.cuh"

namespace jax_flash::inline JF_ARCH_NAMESPACE {

// Shared by all threads of a block, in shared memory.
template <class T, bool kRanges>
struct QueryBlockState : GradientBlock<T>, GapOfTiles<kRanges> {
  GlobalRows<T> dquery;

  // `column`: the first column of dQ that the CTA works on.
  __device__ void prepare(const Problem& p, const GridTiles& grid, int32_t block_m, int32_t block_n,
                          int32_t column) {
    this->template locate<Over::kQueries>(p, grid, block_m);
    const TileWork& tile = this->work.tile;
    const SeenByTile keys = trim_to_segments<Over::kQueries, kRanges>(
        grid.segments, grid.count, block_m, p, this->work, this->band.rows(tile.row, tile.used_queries()));
    this->tiles = tiles_of(keys.any, block_n);
    this->set_gap(keys.gap, block_n);
    dquery = {p.dquery.as<T>() + this->work.offset(p, p.dquery, this->work.head, tile.q_begin) + column,
              p.dquery.row, p.head_dim - column};
  }
};

// A row of csrc/kernels.def. Each warp owns 16 query rows.
template <class T, Row R, ScoreKind Kind>
struct BackwardQueriesSm80 {
  using Element = T;
  static constexpr bool kSliced = R.is_sliced();
  static constexpr int kSliceColumns = R.slice_columns();
  static constexpr int kHeadDim = R.head_dim, kValueDim = R.value_dim, kM = R.block_m;
  static constexpr int kDqColumns = kSliced ? kSliceColumns : kHeadDim;
  static constexpr int kN = R.block_n < 64 ? R.block_n : kHeadDim > 128 ? 32 : 64, kThreads = kM / 16 * 32;
  using QTile = SharedTile<T, kM, kHeadDim>;
  using DoTile = SharedTile<T, kM, kValueDim>;
  using KTile = SharedTile<T, kN, kHeadDim>;
  using VTile = SharedTile<T, kN, kValueDim>;
  using QSlice = SharedTile<T, kM, kDqColumns>;
  using KSlice = SharedTile<T, kN, kDqColumns>;
  using S = Accumulator<1, kN / 8>;
  using Score = PortableScore<Kind, S>;
  static constexpr bool kPlain = Kind == ScoreKind::kPlain;
  using DQ = Accumulator<1, kDqColumns / 8>;
  // V comes first, because only dP = dO Vᵀ needs it, while dQ still needs K after S.
  static constexpr bool kSkips = Score::reads(Operand::kBlockMask);
  using Ring = TileRing<R.stages == 0 ? 0 : 1, kThreads, VTile, KTile, RowSource<T>, kSkips>;
  static constexpr BackwardQueriesLayout kLayout = backward_queries_layout(R.with_tile(kM, kN), sizeof(T));
  static constexpr int kSharedBytes = kLayout.bytes;
  using State = QueryBlockState<T, is_general(Kind)>;
  static_assert(sizeof(State) <= kBlockStateBytes);
  static_assert(kLayout.d_out == QTile::kBytes && kLayout.ring == QTile::kBytes + DoTile::kBytes &&
                kLayout.bytes - kLayout.ring == Ring::kBytes);
};

template <class C>
__device__ __forceinline__ void backward_queries(const Problem& p, const typename C::State& block,
                                                 uint8_t* shared) {
  using QTile = typename C::QTile;
  using DoTile = typename C::DoTile;
  const TileWork& tile = block.work.tile;
  const int32_t warp_row = static_cast<int>(threadIdx.x) / 32 * 16, row = tile.row + warp_row;
  const uint32_t q = ptx::shared_address(shared), d_out = q + C::kLayout.d_out;
  typename C::Ring vk(q + C::kLayout.ring, {block.value, block.key, tile.k_len}, block.tiles);
  const RowStatistics<typename C::S> rows(p, block.lse, block.delta, row, tile.q_len);

  typename C::DQ dq;
  dq.clear();
  const auto from = shown_from<C>(p, block);
  const int32_t first = from(block.tiles.lo);
  if (first < block.tiles.hi) {
    load_tile<QTile, C::kThreads>(q, block.query, tile.row, tile.used_queries());
    load_tile<DoTile, C::kThreads>(d_out, block.dout, tile.row, tile.used_queries());
    vk.start(first, from);
  }
  for (int32_t n = first; n < block.tiles.hi; n = vk.next(n)) {
    const int32_t key = n * C::kN;
    typename C::S s, dp;
    mma_qk<DoTile, typename C::VTile>(dp, d_out, warp_row, vk.wait_first(n, from));  // dP = dO Vᵀ  [M, N]
    const uint32_t k = vk.wait_second(n);
    mma_qk<QTile, typename C::KTile>(s, q, warp_row, k);  // S = Q Kᵀ  [M, N]
    rows.clear_unseen(s, dp);
    const bool partial =
        block.band.classify(tile.row, tile.row + C::kM, key, key + C::kN) != TileClass::kFull;
    typename C::Score score;
    const ScoreTile<typename C::Element, decltype(block.score)> at{p, block.score, block.band, row, key};
    score.prefetch_gradient(at);
    tile_gradient(score, at, rows, partial, s, dp);
    mma_pv<typename C::KSlice>(dq, dp, k + slice_offset<C, typename C::KTile>());  // dQ += dS K  [M, d]
  }
  for_each(dq, [&](float& x, int, int, int) { x *= p.spec.scale; });  // dQ ← scale · dQ
  store_rows<typename C::QSlice>(dq, shared, warp_row, block.dquery, row, tile.end);
}

template <class C>
__global__ void __launch_bounds__(C::kThreads)
    backward_queries_sm80(const __grid_constant__ Problem p, const __grid_constant__ GridTiles grid) {
  __shared__ typename C::State block;
  if (threadIdx.x == 0) {
    block.prepare(p, grid, C::kM, C::kN, first_column<C>());
    if constexpr (!C::kPlain) block.score.template prepare<typename C::Score>(p, block.work, block.work.head);
  }
  __syncthreads();
  if (block.work.tile.row < block.work.tile.end) backward_queries<C>(p, block, ptx::dynamic_shared());
}

template <class C>
cudaError_t launch_backward_queries(const Problem& p, const TileGrid& grid, void* workspace,
                                    cudaStream_t stream) {
  return launch(backward_queries_sm80<C>, {grid.blocks, slice_count<C>(p.head_dim)}, C::kThreads,
                C::kSharedBytes, stream, p, grid_tiles(p, grid, workspace));
}

}  // namespace jax_flash::inline JF_ARCH_NAMESPACE
