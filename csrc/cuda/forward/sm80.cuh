// The forward for sm_80 and every newer card: mma.sync, ldmatrix, cp.async. FlashAttention-2 (Dao, 2023).
#pragma once

#include "core/plan.h"
#include "cuda/epilogue.cuh"
#include "cuda/launch.h"
#include "cuda/load_kv.cuh"
#include "cuda/mask.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/registry.h"
#include "cuda/score.cuh"
#include "cuda/softmax.cuh"
#include "cuda/tile/fragments.cuh"
#include "cuda/work.cuh"

namespace jax_flash {

// What all threads of a block share. It lies in shared memory: their registers are full of S and O.
template <class T>
struct BlockState {
  BlockWork work;
  Band band;
  Interval tiles;  // of keys, that any row of the query tile sees
  Interval whole;  // keys that all its rows see
  GlobalRows<const T> query;
  GlobalRows<T> out;

  __device__ void prepare(const Problem& p, const TileWork* schedule, int32_t q_tiles, int32_t block_m,
                          int32_t block_n) {
    work = find_work<Over::kQueries>(p, schedule, q_tiles, block_m);
    const int32_t head = work.head;
    const TileWork& tile = work.tile;
    band = work.band(p);
    const Interval visible = band.rows(tile.row, tile.used_queries());
    tiles = visible.empty() ? Interval{0, 0} : Interval{visible.lo / block_n, (visible.hi - 1) / block_n + 1};
    whole = band.common(tile.row, tile.used_queries());
    query = {p.query.as<const T>() + work.offset(p, p.query, head, tile.q_begin), p.query.row, p.head_dim};
    out = {p.out.as<T>() + work.offset(p, p.out, head, tile.q_begin), p.out.row, p.value_dim};
  }
};

// Keys that lie side by side.
template <class T>
struct DenseState : BlockState<T> {
  using Source = RowSource<T>;
  static constexpr bool kScaled = false;  // keys and values are stored as they are
  GlobalRows<const T> key, value;

  __device__ void prepare(const Problem& p, const TileWork* schedule, int32_t q_tiles, int32_t block_m,
                          int32_t block_n) {
    BlockState<T>::prepare(p, schedule, q_tiles, block_m, block_n);
    const BlockWork& work = this->work;
    const int32_t kv_head = p.kv_head(work.head), first = work.tile.k_begin;
    key = {p.key.as<const T>() + work.offset(p, p.key, kv_head, first), p.key.row, p.head_dim};
    value = {p.value.as<const T>() + work.offset(p, p.value, kv_head, first), p.value.row, p.value_dim};
  }
  __device__ __forceinline__ Source source() const { return {key, value, this->work.tile.k_len}; }
};

static_assert(sizeof(DenseState<float>) <= kBlockStateBytes);

// A row of csrc/kernels.def. A warp of the plain kernel owns 16 or 32 query rows; in the general one, whose
// scores need more registers, 16. State: what a block knows of its operands, DenseState or PagedState.
template <class T, int HeadDim, int ValueDim, int M, int N, int Stages, int Warps, int Blocks, bool General,
          class State_ = DenseState<T>>
struct ForwardSm80 {
  using Element = T;
  using State = State_;
  static constexpr bool kGeneral = General;
  static constexpr int kM = M, kN = N;
  static constexpr int kWarps = General ? M / 16 : Warps;
  static constexpr int kThreads = kWarps * 32, kBlocks = General ? 1 : Blocks;
  static constexpr int kWarpRows = M / kWarps;
  using QTile = SharedTile<T, M, HeadDim>;
  using KTile = SharedTile<T, N, HeadDim>;
  using VTile = SharedTile<T, N, ValueDim>;
  using OTile = SharedTile<T, M, ValueDim>;
  using S = Accumulator<kWarpRows / 16, N / 8>;
  using O = Accumulator<kWarpRows / 16, ValueDim / 8>;
  using Ring = TileRing<Stages, kThreads, KTile, VTile, typename State::Source>;
  static constexpr int kSharedBytes = QTile::kBytes + Ring::kBytes;
  static_assert(kWarpRows % 16 == 0 && N % 16 == 0);
  // A warp stores its rows of O over its own rows of Q.
  static_assert(ValueDim <= HeadDim && QTile::kPitch == OTile::kPitch);
};

template <class C>
__device__ __forceinline__ void forward_tile(const Problem& p, const typename C::State& block,
                                             uint8_t* shared) {
  const TileWork& tile = block.work.tile;
  const int warp_row = static_cast<int>(threadIdx.x) / 32 * C::kWarpRows;
  const uint32_t q = ptx::shared_address(shared);
  const GeneralScore general(p, block.work, block.band, block.work.head);
  typename C::Ring kv(q + C::QTile::kBytes, block.source(), block.tiles);

  typename C::O o;
  o.clear();
  OnlineSoftmax<C::S::kSlots> softmax(C::kGeneral ? 1.0f : p.spec.scale * kLog2e);

  if (!block.tiles.empty()) {
    load_tile<typename C::QTile, C::kThreads>(q, block.query, tile.row, tile.used_queries());
    kv.start();
  }
  for (int32_t n = block.tiles.lo; n < block.tiles.hi; ++n) {
    const int32_t row = tile.row + warp_row, key = n * C::kN;
    typename C::S s;
    mma_qk<typename C::QTile, typename C::KTile>(s, q, warp_row, kv.wait_first(n));  // S = Q Kᵀ  [M, N]
    const uint32_t v = kv.wait_second(n);
    if constexpr (C::State::kScaled) for_each(s, [&](float& x, int, int, int) { x *= block.key_scale; });
    if constexpr (C::kGeneral) general.apply(s, row, key);  // softcap, bias, alibi, masks
    if (key < block.whole.lo || key + C::kN > block.whole.hi) mask(s, block.band, row, key);
    softmax.update(s, o);  // P = 2^(S − m); O ← α O
    if constexpr (C::kGeneral) general.drop(s, row, key);
    mma_pv<typename C::VTile>(o, s, v);  // O ← O + P V   [M, dv]
  }

  float factor = C::kGeneral ? dropout_scale(p.spec) : 1.0f;
  if constexpr (C::State::kScaled) factor *= block.value_scale;
  finish_rows(o, softmax, p, block.work, tile.row + warp_row, factor);
  store_rows<typename C::OTile>(o, shared, warp_row, block.out, tile.row + warp_row, tile.end);
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocks)
    forward_sm80(const __grid_constant__ Problem p, const TileWork* schedule, int32_t tiles) {
  __shared__ typename C::State block;
  if (threadIdx.x == 0) block.prepare(p, schedule, tiles, C::kM, C::kN);
  __syncthreads();
  if (block.work.tile.row < block.work.tile.end) forward_tile<C>(p, block, ptx::dynamic_shared());
}

template <class C>
cudaError_t launch_forward_sm80(const Problem& p, const LaunchPlan& plan, void* workspace,
                                cudaStream_t stream) {
  const TileGrid& grid = plan.queries;
  return launch(forward_sm80<C>, grid.blocks, C::kThreads, C::kSharedBytes, stream, p,
                schedule_of(grid, workspace), static_cast<int32_t>(grid.tiles));
}

}  // namespace jax_flash

// The launch function of one row and dtype, for csrc/cuda/registry.h.
#define JF_DEFINE_LAUNCH(name, dtype, ...)                                                           \
  namespace jax_flash {                                                                              \
  cudaError_t name(const Problem& p, const LaunchPlan& plan, void* workspace, cudaStream_t stream) { \
    if (plan.general)                                                                                \
      return launch_forward_sm80<ForwardSm80<dtype, __VA_ARGS__, true>>(p, plan, workspace, stream); \
    return launch_forward_sm80<ForwardSm80<dtype, __VA_ARGS__, false>>(p, plan, workspace, stream);  \
  }                                                                                                  \
  }
