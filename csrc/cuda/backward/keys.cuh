// dK and dV, one block per key tile and KV head: it walks the query tiles of the group's heads. dQ is added
// to a float32 accumulator in memory on the way, unless another kernel makes it.
#pragma once

#include "core/plan.h"
#include "cuda/epilogue.cuh"
#include "cuda/gradient.cuh"
#include "cuda/launch.h"
#include "cuda/registry.h"
#include "cuda/tile/copy.cuh"
#include "cuda/tile/fragments.cuh"

namespace jax_flash {

// Rows × columns of warps share each product: S and dP; dK and dV, 32 keys a warp; dQ. Where several warps
// share the columns of dK, dV and dQ, or the keys of dK and dV, they take blocks of 16 in turn.
template <class T, int HeadDim, int ValueDim, int M, int N, int Stages, int Warps, int Blocks, bool General>
struct BackwardKeysSm80 {
  using Element = T;
  static constexpr bool kGeneral = General;
  static constexpr int kM = M, kN = N, kStages = Stages, kThreads = Warps * 32;
  static constexpr int kBlocks = General ? 1 : Blocks;
  static constexpr int kKeyWarps = N / 32, kWidthWarps = Warps / kKeyWarps;
  static constexpr int kSRows = M / 16 < kWidthWarps ? M / 16 : kWidthWarps, kSColumns = Warps / kSRows;
  static constexpr int kDqColumns = Warps >= 8 && HeadDim % 64 == 0 ? 4 : 2, kDqRows = Warps / kDqColumns;
  using KTile = SharedTile<T, N, HeadDim>;
  using VTile = SharedTile<T, N, ValueDim>;
  using QTile = SharedTile<T, M, HeadDim>;
  using DoTile = SharedTile<T, M, ValueDim>;
  using PTile = SharedTile<T, M, N>;
  using S = Accumulator<M / kSRows / 16, N / kSColumns / 8>;
  using DK = Accumulator<2, HeadDim / kWidthWarps / 8>;
  using DV = Accumulator<2, ValueDim / kWidthWarps / 8>;
  using DQ = Accumulator<M / kDqRows / 16, HeadDim / kDqColumns / 8>;
  using Statistics = SharedStatistics<S, M>;
  static constexpr int kStepBytes = QTile::kBytes + DoTile::kBytes + Statistics::kBytes;
  static constexpr int kKeyBytes = KTile::kBytes + VTile::kBytes;
  static constexpr int kSharedBytes = kKeyBytes + Stages * kStepBytes + 2 * PTile::kBytes;
  static_assert(N % 32 == 0 && M % (16 * kSRows) == 0 && N % (16 * kSColumns) == 0 &&
                M % (16 * kDqRows) == 0);
  static_assert(HeadDim % (16 * kWidthWarps) == 0 && ValueDim % (16 * kWidthWarps) == 0);
  static_assert(HeadDim % (16 * kDqColumns) == 0 && (Stages == 1 || Stages == 2));
};

// What all threads of a block share.
template <class T>
struct KeyBlockState {
  BlockWork work;
  Band band;
  Interval tiles;                               // of queries, that see any key of the tile
  GlobalRows<const T> key, value, query, dout;  // query, dout: of the group's first head
  GlobalRows<T> dkey, dvalue;

  __device__ void prepare(const Problem& p, const TileWork* schedule, int32_t k_tiles, int32_t block_m,
                          int32_t block_n) {
    work = find_work<Over::kKeys>(p, schedule, k_tiles, block_n);
    const TileWork& tile = work.tile;
    const int32_t head = work.head, kv_head = p.kv_head(head);
    band = work.band(p);
    const Interval rows = band.queries(tile.row, tile.used_keys());
    tiles = rows.empty() ? Interval{0, 0} : Interval{rows.lo / block_m, (rows.hi - 1) / block_m + 1};
    key = {p.key.as<const T>() + work.offset(p, p.key, kv_head, tile.k_begin), p.key.row, p.head_dim};
    value = {p.value.as<const T>() + work.offset(p, p.value, kv_head, tile.k_begin), p.value.row,
             p.value_dim};
    query = {p.query.as<const T>() + work.offset(p, p.query, head, tile.q_begin), p.query.row, p.head_dim};
    dout = {p.dout.as<const T>() + work.offset(p, p.dout, head, tile.q_begin), p.dout.row, p.value_dim};
    dkey = {p.dkey.as<T>() + work.offset(p, p.dkey, kv_head, tile.k_begin), p.dkey.row, p.head_dim};
    dvalue = {p.dvalue.as<T>() + work.offset(p, p.dvalue, kv_head, tile.k_begin), p.dvalue.row, p.value_dim};
  }
};

static_assert(sizeof(KeyBlockState<float>) <= kBlockStateBytes);

// The steps of a block: the query tiles of every head of the group.
struct QueryStep {
  int32_t head, tile, number = 0;

  __device__ __forceinline__ void advance(const Interval& tiles) {
    ++number;
    if (++tile == tiles.hi) tile = tiles.lo, ++head;
  }
};

// Q, dO, lse and delta of a step, into their place in shared memory.
template <class C>
__device__ __forceinline__ void load_queries(const Problem& p,
                                             const KeyBlockState<typename C::Element>& block,
                                             const QueryStep& step, uint32_t shared) {
  const int64_t head = step.head - block.work.head;
  const int32_t row = step.tile * C::kM, end = block.work.tile.q_len;
  auto query = block.query, dout = block.dout;
  query.data += head * p.query.head;
  dout.data += head * p.dout.head;
  load_tile<typename C::QTile, C::kThreads>(shared, query, row, end);
  load_tile<typename C::DoTile, C::kThreads>(shared + C::QTile::kBytes, dout, row, end);
  C::Statistics::template load<C::kThreads>(shared + C::QTile::kBytes + C::DoTile::kBytes, p, block.work,
                                            step.head, row);
}

// Rows that see nothing give nothing, whatever they and their cotangents hold: 0 · NaN is NaN.
template <class C>
__device__ __noinline__ void clear_unseen(uint8_t* q, const float* lse) {
  constexpr int kChunks = C::QTile::kChunks + C::DoTile::kChunks;
  for (int at = static_cast<int>(threadIdx.x); at < C::kM * kChunks; at += C::kThreads) {
    const int row = at / kChunks, chunk = at % kChunks;
    const int offset = chunk < C::QTile::kChunks
                           ? C::QTile::offset(row, chunk)
                           : C::QTile::kBytes + C::DoTile::offset(row, chunk - C::QTile::kChunks);
    if (lse[row] == -INFINITY) *reinterpret_cast<uint4*>(q + offset) = uint4{0, 0, 0, 0};
  }
  __syncthreads();
}

template <class C>
__device__ __forceinline__ void backward_keys(const Problem& p,
                                              const KeyBlockState<typename C::Element>& block,
                                              float* accumulator, uint8_t* shared) {
  using T = typename C::Element;
  using KTile = typename C::KTile;
  using VTile = typename C::VTile;
  using QTile = typename C::QTile;
  using DoTile = typename C::DoTile;
  using PTile = typename C::PTile;
  const TileWork& tile = block.work.tile;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const Placement s_at{warp / C::kSColumns * 16 * C::S::kRowTiles, 16,
                       warp % C::kSColumns * 8 * C::S::kColumnTiles, 16};
  const Placement dk_at{warp % C::kKeyWarps * 16, 16 * C::kKeyWarps, warp / C::kKeyWarps * 16,
                        16 * C::kWidthWarps};
  const Placement dq_at{warp / C::kDqColumns * 16 * C::DQ::kRowTiles, 16, warp % C::kDqColumns * 16,
                        16 * C::kDqColumns};
  const uint32_t k = ptx::shared_address(shared), v = k + KTile::kBytes, steps = k + C::kKeyBytes;
  uint8_t* const p_store = shared + C::kKeyBytes + C::kStages * C::kStepBytes;
  uint8_t* const ds_store = p_store + PTile::kBytes;
  const uint32_t p_tile = ptx::shared_address(p_store), ds_tile = p_tile + PTile::kBytes;
  const int32_t heads_end = block.work.head + p.heads / p.kv_heads;

  typename C::DK dk;
  typename C::DV dv;
  dk.clear();
  dv.clear();
  QueryStep step{block.work.head, block.tiles.lo}, next = step;
  auto fill = [&] {
    if (next.head < heads_end) {
      load_queries<C>(p, block, next, steps + next.number % C::kStages * C::kStepBytes);
      next.advance(block.tiles);
    }
    ptx::cp_async_commit();
  };
  if (!block.tiles.empty()) {
    load_tile<KTile, C::kThreads>(k, block.key, tile.row, tile.used_keys());
    load_tile<VTile, C::kThreads>(v, block.value, tile.row, tile.used_keys());
    fill();
  }
  for (; !block.tiles.empty() && step.head < heads_end; step.advance(block.tiles)) {
    const int place = C::kKeyBytes + step.number % C::kStages * C::kStepBytes;
    const uint32_t q = k + place, d_out = q + QTile::kBytes;
    const int32_t row = step.tile * C::kM;
    const auto* statistics = reinterpret_cast<const float*>(shared + place + QTile::kBytes + DoTile::kBytes);
    const typename C::Statistics rows{statistics + s_at.row};
    ptx::cp_async_wait<0>();
    if (__syncthreads_or(C::Statistics::unseen(statistics))) clear_unseen<C>(shared + place, statistics);
    if constexpr (C::kStages == 2) fill();

    typename C::S s, dp;
    mma_qk<QTile, KTile>(s, q, s_at.row, k, s_at.column);        // S = Q Kᵀ    [M, N]
    mma_qk<DoTile, VTile>(dp, d_out, s_at.row, v, s_at.column);  // dP = dO Vᵀ  [M, N]
    const bool partial =
        block.band.classify(row, row + C::kM, tile.row, tile.row + C::kN) != TileClass::kFull;
    tile_gradient<C::kGeneral, true>({p, block.work, block.band, step.head}, rows, row + s_at.row,
                                     tile.row + s_at.column, partial, s, dp);
    store_accumulator<PTile>(s, p_store, s_at);
    store_accumulator<PTile>(dp, ds_store, s_at);
    __syncthreads();

    multiply_add<T, C::kM / kStepK<T>>(
        dv, ColumnsA<PTile, 16 * C::kKeyWarps>(p_tile, dk_at.row),
        ColumnsB<DoTile, 16 * C::kWidthWarps>(d_out, dk_at.column));  // dV += Pᵀ dO
    if (accumulator) {
      typename C::DQ dq;
      dq.clear();
      multiply_add<T, C::kN / kStepK<T>>(
          dq, RowsA<PTile>(ds_tile, dq_at.row),
          ColumnsB<KTile, 16 * C::kDqColumns, false>(k, dq_at.column));  // dQ = dS K
      const int64_t begin = block.work.offset(p, p.dquery, step.head, tile.q_begin + row);
      add_rows(dq, dq_at, GlobalRows<float>{accumulator + begin, p.dquery.row, p.head_dim}, tile.q_len - row);
    }
    multiply_add<T, C::kM / kStepK<T>>(dk, ColumnsA<PTile, 16 * C::kKeyWarps>(ds_tile, dk_at.row),
                                       ColumnsB<QTile, 16 * C::kWidthWarps>(q, dk_at.column));  // dK += dSᵀ Q
    if constexpr (C::kStages == 1) {
      __syncthreads();
      fill();
    }
  }

  const float dv_factor = C::kGeneral ? dropout_scale(p.spec) : 1.0f;
  for_each(dk, [&](float& x, int, int, int) { x *= p.spec.scale; });
  for_each(dv, [&](float& x, int, int, int) { x *= dv_factor; });
  ptx::cp_async_wait<0>();
  __syncthreads();
  store_accumulator<KTile>(dk, shared, dk_at);
  store_accumulator<VTile>(dv, shared + KTile::kBytes, dk_at);
  __syncthreads();
  const int thread = static_cast<int>(threadIdx.x);
  store_tile<KTile, C::kN, C::kThreads>(shared, 0, block.dkey, tile.row, tile.end, thread);
  store_tile<VTile, C::kN, C::kThreads>(shared + KTile::kBytes, 0, block.dvalue, tile.row, tile.end, thread);
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocks)
    backward_keys_sm80(const __grid_constant__ Problem p, const TileWork* schedule, int32_t tiles,
                       float* accumulator) {
  __shared__ KeyBlockState<typename C::Element> block;
  if (threadIdx.x == 0) block.prepare(p, schedule, tiles, C::kM, C::kN);
  __syncthreads();
  if (block.work.tile.row < block.work.tile.end)
    backward_keys<C>(p, block, accumulator, ptx::dynamic_shared());
}

// accumulator: dQ in float32, null: not wanted.
template <class C>
cudaError_t launch_backward_keys(const Problem& p, const TileGrid& grid, void* workspace, float* accumulator,
                                 cudaStream_t stream) {
  return launch(backward_keys_sm80<C>, grid.blocks, C::kThreads, C::kSharedBytes, stream, p,
                schedule_of(grid, workspace), static_cast<int32_t>(grid.tiles), accumulator);
}

}  // namespace jax_flash
