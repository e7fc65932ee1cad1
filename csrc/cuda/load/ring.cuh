// A ring of tile pairs (K and V) in shared memory, which cp.async fills ahead of the products.
//
// Two or more stages: both tiles of a pair arrive together, behind one __syncthreads.
// One stage: K is copied while V is multiplied, and the other way round; each tile has its own __syncthreads.
// No stage: K and V share one buffer, and each copy starts after the other tile's product. This is for cards
// with little shared memory, and for sm_75, whose copies are synchronous anyway.
#pragma once

#include <cstdint>

#include "core/band.h"
#include "core/families/portable_layout.h"
#include "cuda/ptx/cp_async.cuh"

namespace jax_flash {

// The numbers of the pairs after the current one, n, that a source must know of: kAhead of them. kSkips: the
// kernel may skip pairs; from(n) is then the first pair from n on that it does not skip. One number is kept
// in a register, several in shared memory. use: the pairs before the current one.
template <int kAhead, bool kSkips>
class NextPairs {
  static constexpr bool kShared = kSkips && kAhead > 1;

 public:
  // `shared`: kAhead numbers.
  __device__ __forceinline__ explicit NextPairs(int32_t* shared) : shared_(shared) {}

  // Finds those that must be known before the first pair is waited for, and calls start(the i-th pair).
  template <class From, class Start>
  __device__ __forceinline__ void start(int32_t n, From from, Start start) {
    int32_t pairs[kAhead] = {n};
#pragma unroll
    for (int i = 1; i < kAhead; ++i) {
      pairs[i] = kSkips ? from(pairs[i - 1] + 1) : n + i;
      if (kShared && threadIdx.x == 0) shared_[i] = pairs[i];
    }
    start([&](int i) { return pairs[i]; });
  }
  // Finds the last one, and calls sync(), behind which no thread reads the number that it replaces.
  template <class From, class Sync>
  __device__ __forceinline__ int32_t find(int32_t n, int32_t use, From from, Sync sync) {
    int32_t last = n + kAhead;
    if constexpr (kSkips && !kShared) last = next_ = from(n + 1);
    sync();
    if constexpr (kShared) {
      last = from(shared_[(use + kAhead - 1) % kAhead] + 1);
      if (threadIdx.x == 0) shared_[use % kAhead] = last;
    }
    return last;
  }
  // The first of them.
  __device__ __forceinline__ int32_t first(int32_t n, int32_t use) const {
    if constexpr (!kSkips) return n + 1;
    if constexpr (!kShared) return next_;
    return static_cast<const volatile int32_t&>(shared_[(use + 1) % kAhead]);
  }

 private:
  int32_t* shared_;
  int32_t next_;
};

// First, Second: the SharedTile types of a pair. Source: RowSource or PageSource, which copies tile n of
// either operand. Pairs are requested in ascending order, the first tile before the second. kSkips: as in
// NextPairs.
template <int kStages, int kThreads, class First, class Second, class Source, bool kSkips = false>
class TileRing {
  static_assert(kStages <= 2);

 public:
  static constexpr int kBytes = ring_bytes(kStages, First::kBytes, Second::kBytes);

  __device__ __forceinline__ TileRing(uint32_t shared, const Source& source, const Interval& tiles)
      : shared_(shared), source_(source), tiles_(tiles), next_(source.numbers()) {}

  // Starts the copies of pair n, the first one. Copies that the caller has issued before (Q) join their first
  // group, and so arrive with the first tile.
  template <class From>
  __device__ __forceinline__ void start(int32_t n, From from) {
    next_.start(n, from,
                [&](auto tile_at) { source_.template start<First, Second, kThreads>(stage_of(n), tile_at); });
    if constexpr (kStages == 1) fill_first(n, stage_of(n));
    if constexpr (kStages == 2) fill(n, stage_of(n));
  }
  // The pair after n, whose tiles have been waited for.
  __device__ __forceinline__ int32_t next(int32_t n) const { return next_.first(n, uses_ - 1); }

  // Waits for the first tile of pair `n` and returns its address. Its __syncthreads also makes sure that
  // every warp has read the pair before, whose stage is refilled.
  template <class From>
  __device__ __forceinline__ uint32_t wait_first(int32_t n, From from) {
    const int32_t stage = stage_of(n);
    const int32_t last = next_.find(n, stage, from, [] {
      ptx::cp_async_wait<0>();
      __syncthreads();
    });
    source_.look_ahead(stage + kStages, last);
    if constexpr (kStages == 2) {
      skip(n);
      fill(next_.first(n, stage), stage + 1);
    } else {
      fill_second(n, stage);
    }
    return first_address(stage);
  }

  // Waits for the second tile of pair `n` and returns its address.
  __device__ __forceinline__ uint32_t wait_second(int32_t n) {
    const int32_t stage = stage_of(n);
    if constexpr (kStages == 1) {
      ptx::cp_async_wait<0>();
      __syncthreads();
      skip(n);
      fill_first(next_.first(n, stage), stage + 1);
    }
    if constexpr (kSkips) ++uses_;
    return second_address(stage);
  }

  // Called after the last pair, so that no copy outlives the thread block.
  __device__ __forceinline__ void finish() const { ptx::cp_async_wait<0>(); }
  // The scale by page of key `row` of pair `n`, between wait_first() and wait_second().
  __device__ __forceinline__ float key_scale(int32_t n, int32_t row) const {
    return source_.key_scale(stage_of(n), row);
  }

 private:
  // Counts the pairs up to the current one, `n`; modulo kStages this is its stage.
  __device__ __forceinline__ int32_t stage_of(int32_t n) const { return kSkips ? uses_ : n; }
  __device__ __forceinline__ uint32_t first_address(int32_t stage) const {
    return shared_ + stage % kStages * First::kBytes;
  }
  __device__ __forceinline__ uint32_t second_address(int32_t stage) const {
    return shared_ + kStages * First::kBytes + stage % kStages * Second::kBytes;
  }
  __device__ __forceinline__ void skip(int32_t n) {
    if constexpr (kSkips) source_.template skip<First>(next_.first(n, uses_) - n - 1);
  }

  // Also called past the last tile, for which the source reads nothing: a branch here would keep the copies
  // from overlapping the product.
  __device__ __forceinline__ void fill(int32_t n, int32_t stage) {
    source_.template load_first<First, kThreads>(first_address(stage), n, stage);
    source_.template load_second<Second, kThreads>(second_address(stage), n, stage);
    ptx::cp_async_commit();
  }
  __device__ __forceinline__ void fill_first(int32_t n, int32_t stage) {
    if (n < tiles_.hi) source_.template load_first<First, kThreads>(first_address(stage), n, stage);
    ptx::cp_async_commit();
  }
  __device__ __forceinline__ void fill_second(int32_t n, int32_t stage) {
    if (n < tiles_.hi) source_.template load_second<Second, kThreads>(second_address(stage), n, stage);
    ptx::cp_async_commit();
  }

  uint32_t shared_;
  Source source_;
  const Interval& tiles_;
  NextPairs<Source::kAhead, kSkips> next_;
  int32_t uses_ = 0;  // with kSkips: the pairs before this one
};

// Without stages both tiles share one buffer.
template <int kThreads, class First, class Second, class Source, bool kSkips>
class TileRing<0, kThreads, First, Second, Source, kSkips> {
 public:
  static constexpr int kBytes = ring_bytes(0, First::kBytes, Second::kBytes);

  __device__ __forceinline__ TileRing(uint32_t shared, const Source& source, const Interval&)
      : shared_(shared), source_(source), next_(source.numbers()) {}

  template <class From>
  __device__ __forceinline__ void start(int32_t n, From from) {
    next_.start(n, from, [&](auto tile_at) { source_.template start<First, Second, kThreads>(0, tile_at); });
  }
  __device__ __forceinline__ int32_t next(int32_t n) const { return next_.first(n, 0); }
  template <class From>
  __device__ __forceinline__ uint32_t wait_first(int32_t n, From from) {
    source_.look_ahead(0, next_.find(n, 0, from, [] {}));
    return refill([&] { source_.template load_first<First, kThreads>(shared_, n, 0); });
  }
  __device__ __forceinline__ uint32_t wait_second(int32_t n) {
    const uint32_t tile = refill([&] { source_.template load_second<Second, kThreads>(shared_, n, 0); });
    if constexpr (kSkips) source_.template skip<First>(next_.first(n, 0) - n - 1);
    return tile;
  }
  __device__ __forceinline__ void finish() const {}
  __device__ __forceinline__ float key_scale(int32_t, int32_t row) const { return source_.key_scale(0, row); }

 private:
  template <class Load>
  __device__ __forceinline__ uint32_t refill(Load load) {
    __syncthreads();  // every warp has read the tile in the buffer
    load();
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
    return shared_;
  }

  uint32_t shared_;
  Source source_;
  NextPairs<Source::kAhead, kSkips> next_;
};

}  // namespace jax_flash
