// Loads of the backward over key tiles: a block's state, its steps over query tiles, the copies of Q, dO, lse
// and delta, and the barriers between copies and products.
#pragma once

#include "core/plan/launch_plan.h"
#include "cuda/backward/keys_traits.cuh"
#include "cuda/backward/query_step.cuh"
#include "cuda/backward/query_sums.cuh"
#include "cuda/gradient.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/tile/copy.cuh"

namespace jax_flash::inline JF_ARCH_NAMESPACE {

// Shared by all threads of a block, in shared memory.
template <class T, bool kRanges>
struct KeyBlockState : GradientBlock<T>, GapOfTiles<kRanges> {
  Interval rows;   // from the first to the last query that may see one of the block's keys
  Interval whole;  // queries that see all of them
  GlobalRows<T> dkey, dvalue;
  T* dquery;           // of the group's first head, where the block has all keys
  float* sums;         // sums of dQ at the sequence's first query tile and the group's first head, or null
  int32_t score_head;  // the head, within the group, that `score` is prepared for

  // Whether masks hide the block's keys from all rows of a step.
  __device__ __forceinline__ bool hides(const Problem& p, const QueryStep& step, int32_t block_m) const {
    const int32_t row = step.tile * block_m;
    const TileWork& tile = this->work.tile;
    return this->score.hides(p, step.head - score_head, {row, min(row + block_m, tile.q_len)},
                             {tile.row, tile.used_keys()});
  }

  // Makes the block go through all query tiles, since it stores the dQ of rows that see no key, too. Keys
  // that no row sees are not read.
  __device__ void take_all_queries(const Problem& p, int32_t block_m) {
    if (rows.empty()) this->work.tile.k_len = 0;
    this->tiles = {0, static_cast<int32_t>(ceil_div(p.q_rows, block_m))};
    dquery = p.dquery.as<T>() + this->work.offset(p, p.dquery, this->work.head, 0);
  }

  // `column`: the first column of dK and dV that the CTA works on.
  template <int kM>
  __device__ void prepare(const Problem& p, const GridTiles& grid, int32_t block_n, const QuerySums& all_sums,
                          int32_t column) {
    this->template locate<Over::kKeys>(p, grid, block_n);
    const BlockWork& work = this->work;
    const TileWork& tile = work.tile;
    const int32_t kv_head = p.kv_head(work.head);
    score_head = 0;
    rows = this->band.queries(tile.row, tile.used_keys());
    const SeenByTile seen =
        trim_to_segments<Over::kKeys, kRanges>(grid.segments, grid.count, block_n, p, work, rows);
    rows = seen.any;
    this->set_gap(seen.gap, kM);
    whole = this->band.common_queries(tile.row, tile.row + block_n);
    this->tiles = tiles_of(rows, kM);
    dkey = {p.dkey.as<T>() + work.offset(p, p.dkey, kv_head, tile.k_begin) + column, p.dkey.row,
            p.head_dim - column};
    dvalue = {p.dvalue.as<T>() + work.offset(p, p.dvalue, kv_head, tile.k_begin) + column, p.dvalue.row,
              p.value_dim - column};
    sums = all_sums.data ? sum_tile<kM>(p, all_sums.data, all_sums.first_tile<kM>(p, work)) : nullptr;
  }
};

template <class C>
using KeyBlockStateOf = KeyBlockState<typename C::Element, C::Score::reads(Operand::kRanges)>;

// Advances `step` to the first step, from this one on, that masks or ranges do not hide. If there is none,
// step.head becomes `heads`, the number of heads in the group. All lanes of a warp call it.
template <class C>
__device__ __forceinline__ void seek_shown(const Problem& p, const KeyBlockStateOf<C>& block, int32_t heads,
                                           QueryStep& step) {
  if constexpr (C::Score::reads(Operand::kBlockMask)) {
    step.tile = block.from(step.tile);
    if (!block.score.skips(p)) return;
    while (step.head < heads) {
      const int32_t own = step.tile + static_cast<int32_t>(threadIdx.x % 32);
      const bool shown = own < block.tiles.hi && !block.hides(p, {step.head, own, 0}, C::kM);
      const uint32_t all = __ballot_sync(~0u, shown);
      step.tile += all ? __ffs(static_cast<int>(all)) - 1 : 32;
      if (all) return;
      if (step.tile >= block.tiles.hi) step.tile = block.tiles.lo, ++step.head;
    }
  }
}
template <class C>
__device__ __forceinline__ void advance_shown(const Problem& p, const KeyBlockStateOf<C>& block,
                                              int32_t heads, QueryStep& step) {
  step.advance(block.tiles);
  seek_shown<C>(p, block, heads, step);
}
template <class C>
__device__ __forceinline__ QueryStep first_shown(const Problem& p, const KeyBlockStateOf<C>& block,
                                                 int32_t heads) {
  QueryStep step{0, block.tiles.lo, 0};
  if (!block.tiles.empty()) seek_shown<C>(p, block, heads, step);
  return step;
}

// lse and delta of a query tile in shared memory: [2, M].
template <class S, int M>
struct SharedStatistics {
  const float* first;  // lse of the accumulator's first row

  __device__ __forceinline__ float lse(int slot) const { return row_lse(first[S::row(slot)]); }
  __device__ __forceinline__ float delta(int slot) const {
    return row_delta(first[S::row(slot)], first[M + S::row(slot)]);
  }
};

// The lse of rows that are not used: it makes P = 0 whatever bias or alibi add to their scores.
static __device__ const float kUnusedLse = INFINITY;

// Starts the copies of a step's Q, dO, lse and delta into the stage at `shared`. Rows that see none of the
// keys become zeros, because they may hold NaN or infinities and 0 · NaN is NaN.
template <class C>
__device__ __forceinline__ void load_queries(const Problem& p, const KeyBlockStateOf<C>& block,
                                             const QueryStep& step, uint32_t shared) {
  const int32_t row = step.tile * C::kM, lo = block.rows.lo - row, hi = block.rows.hi - row;
  auto used = [=](int i, int r) { return lo - i <= r && r < hi - i; };
  auto query = block.query, dout = block.dout;
  query.data += step.head * p.query.head;
  dout.data += step.head * p.dout.head;
  load_tile_where<typename C::QTile, C::kThreads>(shared, query, row, used);
  load_tile_where<typename C::DoTile, C::kThreads>(shared + C::kLayout.d_out, dout, row, used);
  const int i = static_cast<int>(threadIdx.x);
  if (i < C::kM) {
    const uint32_t lse = shared + C::kLayout.lse + i * 4;
    const int64_t at = used(i, 0) ? row + i : 0;
    ptx::cp_async_4(lse, used(i, 0) ? block.lse + step.head * p.lse.head + at * p.lse.row : &kUnusedLse,
                    true);
    ptx::cp_async_4(lse + C::kM * 4, block.delta + step.head * p.delta.head + at * p.delta.row, used(i, 0));
  }
}

// Zeros Q and dO of rows that see no key for other reasons than the band (lse = −inf). All threads call it.
template <class C>
__device__ __noinline__ void clear_unseen(uint8_t* q, const float* lse) {
  const int i = static_cast<int>(threadIdx.x);
  if (!__syncthreads_or(i < C::kM && lse[i] == -INFINITY)) return;
  constexpr int kChunks = C::QTile::kChunks + C::DoTile::kChunks;
  for (int at = i; at < C::kM * kChunks; at += C::kThreads) {
    const int row = at / kChunks, chunk = at % kChunks;
    const int offset = chunk < C::QTile::kChunks
                           ? C::QTile::offset(row, chunk)
                           : C::kLayout.d_out + C::DoTile::offset(row, chunk - C::QTile::kChunks);
    if (lse[row] == -INFINITY) *reinterpret_cast<uint4*>(q + offset) = uint4{0, 0, 0, 0};
  }
  __syncthreads();
}

// The block's mbarriers: P and dS full, P and dS empty, and Q and dO full for each stage. Every thread
// arrives itself, because compute-sanitizer does not understand an arrival on behalf of other threads.
template <class C>
class KeyBarriers {
 public:
  static constexpr int kCount = 2 + C::kStages;
  static_assert(ptx::kBarrierBytes == kMbarrierBytes &&
                C::kLayout.bytes - C::kLayout.barriers == kCount * ptx::kBarrierBytes);

  __device__ __forceinline__ explicit KeyBarriers(uint32_t first) : first_(first) {}
  __device__ __forceinline__ void init() const {
    for (int i = 0; i < kCount; ++i) ptx::barrier_init(at(i), C::kThreads);
  }

  // Arrives at the step's barrier once this thread's copies are complete.
  __device__ __forceinline__ void arrive_queries_full(const QueryStep& step) const {
    ptx::barrier_arrive_after_copies(at(2 + step.number % C::kStages));
  }
  __device__ __forceinline__ void wait_queries_full(const QueryStep& step) const {
    ptx::barrier_wait(at(2 + step.number % C::kStages), step.number / C::kStages);
  }
  // Says that this thread has stored its P and dS.
  __device__ __forceinline__ void arrive_ds_full() const { ptx::barrier_arrive(at(0)); }
  __device__ __forceinline__ void wait_ds_full(const QueryStep& step) const {
    ptx::barrier_wait(at(0), step.number);
  }
  // Says that this thread has read P and dS of the step, and with them Q and dO, so that they may be
  // overwritten.
  __device__ __forceinline__ void arrive_ds_empty() const { ptx::barrier_arrive(at(1)); }
  __device__ __forceinline__ void wait_ds_empty(int32_t number) const {
    if (number >= 0) ptx::barrier_wait(at(1), number);
  }

 private:
  __device__ __forceinline__ uint32_t at(int i) const { return first_ + i * ptx::kBarrierBytes; }

  uint32_t first_;
};

}  // namespace jax_flash::inline JF_ARCH_NAMESPACE
