// dK and dV, one block per key tile and KV head: it walks the query tiles of the group's heads. dQ is added
// to a float32 accumulator in memory on the way, unless another kernel makes it.
#pragma once

#include <type_traits>

#include "core/plan.h"
#include "cuda/epilogue.cuh"
#include "cuda/gradient.cuh"
#include "cuda/launch.h"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/registry.h"
#include "cuda/tile/copy.cuh"
#include "cuda/tile/fragments.cuh"

namespace jax_flash::inline JF_FAMILY {

// The general kernel, whose scores need more registers, takes half the query rows at a time where
// the warps can share them.
//
// Rows × columns of warps share each product: S and dP; dK and dV, 32 or 16 keys a warp; dQ. The warps that
// share keys make these columns of S and dP among them, so that dK and dV wait for no other warp; where the
// tile has no 16 × 16 for each, the first of them do.
template <class T, int HeadDim, int ValueDim, int M, int N, int Stages, int Warps, int Blocks, bool General>
struct BackwardKeysSm80 {
  using Element = T;
  static constexpr bool kGeneral = General;
  static constexpr int kDqColumns = M == 16 || (Warps >= 8 && HeadDim % 64 == 0) ? 4 : 2,
                       kDqRows = Warps / kDqColumns;
  static constexpr int kM = General && M / 2 % (16 * kDqRows) == 0 ? M / 2 : M, kN = N, kStages = Stages,
                       kWarps = Warps, kThreads = Warps * 32;
  static constexpr int kBlocks = General ? 1 : Blocks;
  static constexpr int kWarpKeys = N < 32 ? N : 32, kKeyWarps = N / kWarpKeys,
                       kWidthWarps = Warps / kKeyWarps;
  static constexpr int kSRows = kM / 16 < kWidthWarps ? kM / 16 : kWidthWarps;
  static constexpr int kSColumns = Warps / kSRows < N / 16 ? Warps / kSRows : N / 16;
  // Permuted tiles give each thread adjacent keys, so that bias and mask are read in wide loads.
  static constexpr bool kPermuted = General && N / kSColumns % 32 == 0;
  using KTile = SharedTile<T, N, HeadDim, kPermuted>;
  using VTile = SharedTile<T, N, ValueDim, kPermuted>;
  using QTile = SharedTile<T, kM, HeadDim>;
  using DoTile = SharedTile<T, kM, ValueDim>;
  using PTile = SharedTile<T, kM, N>;
  static constexpr int kSRowTiles = kM / kSRows / 16, kSColumnTiles = N / kSColumns / 8;
  using S = std::conditional_t<kPermuted, PermutedAccumulator<kSRowTiles, kPermuted ? kSColumnTiles : 4>,
                               Accumulator<kSRowTiles, kSColumnTiles>>;
  using DK = Accumulator<kWarpKeys / 16, HeadDim / kWidthWarps / 8>;
  using DV = Accumulator<kWarpKeys / 16, ValueDim / kWidthWarps / 8>;
  using DQ = Accumulator<kM / kDqRows / 16, HeadDim / kDqColumns / 8>;
  // In shared memory: K, V; Q, dO, lse [kM] and delta [kM] of each stage; P, dS; barriers. Without a stage Q
  // and dO have one place.
  static constexpr bool kInTurn = Stages == 0;
  static constexpr int kQueryBytes = !kInTurn                         ? QTile::kBytes + DoTile::kBytes
                                     : QTile::kBytes > DoTile::kBytes ? QTile::kBytes
                                                                      : DoTile::kBytes;
  static constexpr int kStepBytes = kQueryBytes + 2 * kM * 4;
  static constexpr int kKeyBytes = KTile::kBytes + VTile::kBytes;
  static constexpr int kPBegin = kKeyBytes + (kInTurn ? 1 : Stages) * kStepBytes;
  static constexpr int kBarriers = kPBegin + 2 * PTile::kBytes;
  static constexpr int kSharedBytes = kBarriers + (2 + Stages) * ptx::kBarrierBytes;
  static_assert(N % kWarpKeys == 0 && kM % (16 * kSRows) == 0 && N % (16 * kSColumns) == 0 &&
                kM % (16 * kDqRows) == 0 && kSColumns % kKeyWarps == 0);
  static_assert(HeadDim % (16 * kWidthWarps) == 0 && ValueDim % (16 * kWidthWarps) == 0);
  static_assert(HeadDim % (16 * kDqColumns) == 0 && Stages <= 2 && kThreads >= kM);
};

// What a warp makes of each product.
template <class C>
struct WarpPlaces {
  int group;  // of the warps that share keys
  bool makes_s;
  Placement s, dk, dq;

  __device__ __forceinline__ WarpPlaces() {
    constexpr int kPerGroup = C::kSColumns / C::kKeyWarps;
    const auto warp = __shfl_sync(~0u, static_cast<uint32_t>(ptx::thread_index()) / 32, 0);
    group = static_cast<int>(warp / C::kWidthWarps);
    const int part = static_cast<int>(warp % C::kWidthWarps);
    makes_s = C::kSRows * C::kSColumns == C::kWarps || part < C::kSRows * kPerGroup;
    s = {part / kPerGroup * 16 * C::S::kRowTiles, 16,
         (group * kPerGroup + part % kPerGroup) * 8 * C::S::kColumnTiles, 16};
    dk = {group * C::kWarpKeys, 16, part * 16, 16 * C::kWidthWarps};
    dq = {static_cast<int>(warp / C::kDqColumns) * 16 * C::DQ::kRowTiles, 16,
          static_cast<int>(warp % C::kDqColumns) * 16, 16 * C::kDqColumns};
  }
};

// What all threads of a block share.
template <class T>
struct KeyBlockState : GradientBlock<T> {
  Interval rows, whole;  // of queries: those that see any of the block's keys, and all of a tile's
  GlobalRows<T> dkey, dvalue;
  float* dquery;  // in the accumulator: the sequence's first row, the group's first head; null: not wanted

  __device__ void prepare(const Problem& p, const TileWork* schedule, int32_t k_tiles, int32_t block_m,
                          int32_t block_n, float* accumulator) {
    this->template locate<Over::kKeys>(p, schedule, k_tiles, block_n);
    const BlockWork& work = this->work;
    const TileWork& tile = work.tile;
    const int32_t kv_head = p.kv_head(work.head);
    rows = this->band.queries(tile.row, tile.used_keys());
    whole = this->band.common_queries(tile.row, tile.row + block_n);
    this->set_tiles(rows, block_m);
    dkey = {p.dkey.as<T>() + work.offset(p, p.dkey, kv_head, tile.k_begin), p.dkey.row, p.head_dim};
    dvalue = {p.dvalue.as<T>() + work.offset(p, p.dvalue, kv_head, tile.k_begin), p.dvalue.row, p.value_dim};
    dquery = nullptr;
    if (accumulator) {
      const int64_t batch = work.leading * (p.packed() ? 1 : p.batch) + work.batch_row;
      dquery = accumulator +
               ((batch * p.q_rows + tile.q_begin) * p.heads + work.head) * accumulator_columns(p.head_dim);
    }
  }
};

// lse and delta of a tile's rows, in shared memory: [M] each.
template <class S, int M>
struct SharedStatistics {
  const float* first;  // of the accumulator's rows

  __device__ __forceinline__ float lse(int slot) const { return row_lse(first[S::row(slot)]); }
  __device__ __forceinline__ float delta(int slot) const {
    return row_delta(first[S::row(slot)], first[M + S::row(slot)]);
  }
};

// The steps of a block: the query tiles of every head of the group.
struct QueryStep {
  int32_t head, tile, number = 0;  // head: counted from the group's first

  __device__ __forceinline__ void advance(const Interval& tiles) {
    ++number;
    if (++tile == tiles.hi) tile = tiles.lo, ++head;
  }
};

// Makes P = 0, whatever bias or alibi give a row that is not there.
static __device__ const float kUnusedLse = INFINITY;

// Q, dO, lse and delta of a step, into their place in shared memory. Rows that see none of the keys are zero:
// they may hold anything, and 0 · NaN is NaN.
template <class C>
__device__ __forceinline__ void load_queries(const Problem& p,
                                             const KeyBlockState<typename C::Element>& block,
                                             const QueryStep& step, uint32_t shared) {
  const int32_t row = step.tile * C::kM, lo = block.rows.lo - row, hi = block.rows.hi - row;
  auto used = [=](int i, int r) { return lo - i <= r && r < hi - i; };
  auto query = block.query, dout = block.dout;
  query.data += step.head * p.query.head;
  dout.data += step.head * p.dout.head;
  load_tile_where<typename C::QTile, C::kThreads>(shared, query, row, used);
  load_tile_where<typename C::DoTile, C::kThreads>(shared + C::QTile::kBytes, dout, row, used);
  const int i = static_cast<int>(threadIdx.x);
  if (i < C::kM) {
    const uint32_t to = shared + C::QTile::kBytes + C::DoTile::kBytes + i * 4;
    const int64_t at = used(i, 0) ? row + i : 0;
    ptx::cp_async_4(to, used(i, 0) ? block.lse + step.head * p.lse.head + at * p.lse.row : &kUnusedLse, true);
    ptx::cp_async_4(to + C::kM * 4, block.delta + step.head * p.delta.head + at * p.delta.row, used(i, 0));
  }
}

// Clears Q and dO of rows that see nothing for other reasons than the band, all threads together.
template <class C>
__device__ __noinline__ void clear_unseen(uint8_t* q, const float* lse) {
  const int i = static_cast<int>(threadIdx.x);
  if (!__syncthreads_or(i < C::kM && lse[i] == -INFINITY)) return;
  constexpr int kChunks = C::QTile::kChunks + C::DoTile::kChunks;
  for (int at = i; at < C::kM * kChunks; at += C::kThreads) {
    const int row = at / kChunks, chunk = at % kChunks;
    const int offset = chunk < C::QTile::kChunks
                           ? C::QTile::offset(row, chunk)
                           : C::QTile::kBytes + C::DoTile::offset(row, chunk - C::QTile::kChunks);
    if (lse[row] == -INFINITY) *reinterpret_cast<uint4*>(q + offset) = uint4{0, 0, 0, 0};
  }
  __syncthreads();
}

// P in s, dS in dp.
template <class C>
__device__ __forceinline__ void score_gradients(const Problem& p,
                                                const KeyBlockState<typename C::Element>& block,
                                                const QueryStep& step, const WarpPlaces<C>& at,
                                                const float* statistics, uint32_t q, uint32_t d_out,
                                                uint32_t k, typename C::S& s, typename C::S& dp) {
  const SharedStatistics<typename C::S, C::kM> rows{statistics + at.s.row};
  const int32_t row = step.tile * C::kM, first = row + at.s.row, key = block.work.tile.row + at.s.column;
  const bool partial = row < block.whole.lo || row + C::kM > block.whole.hi;
  auto multiply_q_k = [&] {  // S = Q Kᵀ  [M, N]
    mma_qk<typename C::QTile, typename C::KTile>(s, q, at.s.row, k, at.s.column);
  };
  auto multiply_do_v = [&] {  // dP = dO Vᵀ  [M, N]
    mma_qk<typename C::DoTile, typename C::VTile>(dp, d_out, at.s.row, k + C::KTile::kBytes, at.s.column);
  };
  if constexpr (C::kPermuted) {
    BiasChunks<typename C::S> bias;
    GeneralScore(p, block.score, block.band).fetch(bias, first, key);
    multiply_q_k();
    multiply_do_v();
    tile_gradient<true, true>(p, block.score, block.band, rows, first, key, partial, s, dp, &bias);
  } else if constexpr (C::kGeneral) {
    multiply_q_k();
    multiply_do_v();
    tile_gradient<true, true>(p, block.score, block.band, rows, first, key, partial, s, dp);
  } else {
    multiply_q_k();
    if (partial) mask(s, block.band, first, key);
    probabilities(s, rows, p.spec.scale * kLog2e);  // P = exp(S − lse)
    multiply_do_v();
    for_each(dp, [&](float& x, int slot, int n, int e) {  // dS = P ∘ (dP − delta)
      x = s.at(slot, n, e) * (x - rows.delta(slot));
    });
  }
}

// dQ of a step, into the accumulator.
template <class C>
__device__ __forceinline__ void add_queries(const Problem& p, const KeyBlockState<typename C::Element>& block,
                                            const QueryStep& step, const typename C::DQ& dq, Placement at) {
  const int32_t row = step.tile * C::kM, columns = accumulator_columns(p.head_dim);
  const int64_t stride = int64_t{p.heads} * columns;
  add_rows(dq, at, {block.dquery + row * stride + step.head * columns, stride, columns},
           block.work.tile.q_len - row);
}

// dK and dV, through the place of K and V, which everyone has left.
template <class C>
__device__ __forceinline__ void store_keys(const Problem& p, const KeyBlockState<typename C::Element>& block,
                                           uint8_t* shared, typename C::DK& dk, typename C::DV& dv) {
  using KTile = typename C::KTile;
  using VTile = typename C::VTile;
  const TileWork& tile = block.work.tile;
  const float dv_factor = C::kGeneral ? dropout_scale(p.spec) : 1.0f;
  for_each(dk, [&](float& x, int, int, int) { x *= p.spec.scale; });
  for_each(dv, [&](float& x, int, int, int) { x *= dv_factor; });
  __syncthreads();
  const Placement dk_at = WarpPlaces<C>().dk;  // once more: the loop has no register to keep it
  store_accumulator<KTile>(dk, shared, dk_at);
  store_accumulator<VTile>(dv, shared + KTile::kBytes, dk_at);
  __syncthreads();
  const int thread = ptx::thread_index();
  store_tile<KTile, C::kN, C::kThreads>(shared, 0, block.dkey, tile.row, tile.end, thread);
  store_tile<VTile, C::kN, C::kThreads>(shared + KTile::kBytes, 0, block.dvalue, tile.row, tile.end, thread);
}

// What warps wait for, phase by phase. Every thread arrives: the sanitizers follow no arrival in another's
// name.
template <class C>
class KeyBarriers {
 public:
  static constexpr int kCount = 2 + C::kStages;

  __device__ __forceinline__ explicit KeyBarriers(uint32_t first) : first_(first) {}
  __device__ __forceinline__ void init() const {
    for (int i = 0; i < kCount; ++i) ptx::barrier_init(at(i), C::kThreads);
  }

  // This thread's copies of a step come after those before.
  __device__ __forceinline__ void loading(const QueryStep& step) const {
    ptx::barrier_arrive_after_copies(at(2 + step.number % C::kStages));
  }
  __device__ __forceinline__ void wait_loaded(const QueryStep& step) const {
    ptx::barrier_wait(at(2 + step.number % C::kStages), step.number / C::kStages);
  }
  // P and dS of a step are in their place.
  __device__ __forceinline__ void stored() const { ptx::barrier_arrive(at(0)); }
  __device__ __forceinline__ void wait_stored(const QueryStep& step) const {
    ptx::barrier_wait(at(0), step.number);
  }
  // All that a step has in shared memory may be overwritten.
  __device__ __forceinline__ void left() const { ptx::barrier_arrive(at(1)); }
  __device__ __forceinline__ void wait_left(int32_t number) const {
    if (number >= 0) ptx::barrier_wait(at(1), number);
  }

 private:
  __device__ __forceinline__ uint32_t at(int i) const { return first_ + i * ptx::kBarrierBytes; }

  uint32_t first_;
};

// Steps overlap: a warp waits only for the copies of its step, for the warps that share its keys before dK
// and dV, for all dS before dQ, and before it stores P and dS until everyone has left those of the step
// before.
template <class C>
__device__ __forceinline__ void backward_keys(const Problem& p, KeyBlockState<typename C::Element>& block,
                                              uint8_t* shared) {
  using T = typename C::Element;
  using PTile = typename C::PTile;
  const TileWork& tile = block.work.tile;
  const WarpPlaces<C> at;
  const uint32_t k = ptx::shared_address(shared), steps = k + C::kKeyBytes, p_tile = k + C::kPBegin,
                 ds_tile = p_tile + PTile::kBytes;
  const KeyBarriers<C> barriers(k + C::kBarriers);
  const int32_t heads = p.heads / p.kv_heads;

  typename C::DK dk;
  typename C::DV dv;
  dk.clear();
  dv.clear();
  QueryStep step{0, block.tiles.lo};
  auto fill = [&](const QueryStep& to) {
    load_queries<C>(p, block, to, steps + to.number % C::kStages * C::kStepBytes);
    barriers.loading(to);
  };
  auto fill_next = [&] {
    QueryStep next = step;
    next.advance(block.tiles);
    if (next.head < heads) fill(next);
  };
  if (!block.tiles.empty()) {
    load_tile<typename C::KTile, C::kThreads>(k, block.key, tile.row, tile.used_keys());
    load_tile<typename C::VTile, C::kThreads>(k + C::KTile::kBytes, block.value, tile.row, tile.used_keys());
    fill(step);
  }
  for (; !block.tiles.empty() && step.head < heads; step.advance(block.tiles)) {
    const int stage = step.number % C::kStages, place = C::kKeyBytes + stage * C::kStepBytes;
    const uint32_t q = k + place, d_out = q + C::QTile::kBytes;
    const auto* statistics =
        reinterpret_cast<const float*>(shared + place + C::QTile::kBytes + C::DoTile::kBytes);
    barriers.wait_loaded(step);
    if constexpr (C::kGeneral) {
      clear_unseen<C>(shared + place, statistics);
      // That was a barrier: everyone has left the scores of the head before.
      if (step.head > 0 && step.tile == block.tiles.lo) {
        if (threadIdx.x == 0) block.score.prepare(p, block.work, block.work.head + step.head);
        __syncthreads();
      }
    }

    typename C::S s, dp;
    if (at.makes_s) score_gradients<C>(p, block, step, at, statistics, q, d_out, k, s, dp);
    barriers.wait_left(step.number - 1);
    if (at.makes_s) {
      store_accumulator<PTile>(s, shared + C::kPBegin, at.s);
      store_accumulator<PTile>(dp, shared + C::kPBegin + PTile::kBytes, at.s);
    }
    barriers.stored();
    if constexpr (C::kStages == 2) fill_next();
    ptx::sync_group(1 + at.group, 32 * C::kWidthWarps);

    multiply_add<T, C::kM / kStepK<T>>(
        dv, ColumnsA<PTile, 16>(p_tile, at.dk.row),
        ColumnsB<typename C::DoTile, 16 * C::kWidthWarps>(d_out, at.dk.column));  // dV += Pᵀ dO
    multiply_add<T, C::kM / kStepK<T>>(
        dk, ColumnsA<PTile, 16>(ds_tile, at.dk.row),
        ColumnsB<typename C::QTile, 16 * C::kWidthWarps>(q, at.dk.column));  // dK += dSᵀ Q
    barriers.wait_stored(step);
    if (block.dquery) {
      typename C::DQ dq;
      dq.clear();
      multiply_add<T, C::kN / kStepK<T>>(
          dq, RowsA<PTile>(ds_tile, at.dq.row),
          ColumnsB<typename C::KTile, 16 * C::kDqColumns, false>(k, at.dq.column));  // dQ = dS K
      barriers.left();
      add_queries<C>(p, block, step, dq, at.dq);
    } else {
      barriers.left();
    }
    if constexpr (C::kStages == 1) {
      barriers.wait_left(step.number);
      fill_next();
    }
  }
  store_keys<C>(p, block, shared, dk, dv);
}

// The same where Q and dO have one place (cuda/backward/turns.cuh).
template <class C>
__device__ __forceinline__ void backward_keys_in_turn(const Problem& p,
                                                      KeyBlockState<typename C::Element>& block,
                                                      uint8_t* shared);

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocks)
    backward_keys_sm80(const __grid_constant__ Problem p, const TileWork* schedule, int32_t tiles,
                       float* accumulator) {
  using Block = KeyBlockState<typename C::Element>;
  static_assert(sizeof(Block) + KeyBarriers<C>::kCount * ptx::kBarrierBytes <= kBlockStateBytes);
  __shared__ Block block;
  uint8_t* const shared = ptx::dynamic_shared();
  if (threadIdx.x == 0) {
    block.prepare(p, schedule, tiles, C::kM, C::kN, accumulator);
    if constexpr (C::kGeneral) block.score.prepare(p, block.work, block.work.head);
    KeyBarriers<C>(ptx::shared_address(shared + C::kBarriers)).init();
  }
  __syncthreads();
  if (block.work.tile.row >= block.work.tile.end) return;
  if constexpr (C::kInTurn) {
    backward_keys_in_turn<C>(p, block, shared);
  } else {
    backward_keys<C>(p, block, shared);
  }
}

// accumulator: dQ in float32, null: not wanted.
template <class C>
cudaError_t launch_backward_keys(const Problem& p, const TileGrid& grid, void* workspace, float* accumulator,
                                 cudaStream_t stream) {
  return launch(backward_keys_sm80<C>, grid.blocks, C::kThreads, C::kSharedBytes, stream, p,
                schedule_of(grid, workspace), static_cast<int32_t>(grid.tiles), accumulator);
}

}  // namespace jax_flash::inline JF_FAMILY
