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

// The pairs after the current one, n, that a source must know of: kAhead of them. kSkips: the kernel may skip
// pairs; from(n) is then the first pair from n on that it does not skip.
template <int kAhead, bool kSkips>
class NextPairs {
 public:
  // Finds those that must be known before the first pair is waited for.
  template <class From>
  __device__ __forceinline__ void start(int32_t n, From from) {
    if constexpr (kSkips) {
#pragma unroll
      for (int i = 1; i < kAhead; ++i) pairs_[i - 1] = from(at(i - 1, n) + 1);
    }
  }
  // Finds the last one.
  template <class From>
  __device__ __forceinline__ void find(int32_t n, From from) {
    if constexpr (kSkips) pairs_[kAhead - 1] = from(at(kAhead - 1, n) + 1);
  }
  // The i-th of them; 0: n itself.
  __device__ __forceinline__ int32_t at(int i, int32_t n) const {
    return i == 0 || !kSkips ? n + i : pairs_[i - 1];
  }
  // Moves on to the first one, and returns it.
  __device__ __forceinline__ int32_t advance(int32_t n) {
    const int32_t next = at(1, n);
    if constexpr (kSkips) {
#pragma unroll
      for (int i = 1; i < kAhead; ++i) pairs_[i - 1] = pairs_[i];
    }
    return next;
  }

 private:
  int32_t pairs_[kAhead];
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
      : shared_(shared), source_(source), tiles_(tiles) {}

  // Starts the copies of pair n, the first one. Copies that the caller has issued before (Q) join their first
  // group, and so arrive with the first tile.
  template <class From>
  __device__ __forceinline__ void start(int32_t n, From from) {
    next_.start(n, from);
    source_.template start<First, Second, kThreads>(stage_of(n), [&](int i) { return next_.at(i, n); });
    if constexpr (kStages == 1) fill_first(n, stage_of(n));
    if constexpr (kStages == 2) fill(n, stage_of(n));
  }
  // The pair after n, whose tiles have been waited for.
  __device__ __forceinline__ int32_t next(int32_t n) { return next_.advance(n); }

  // Waits for the first tile of pair `n` and returns its address. Its __syncthreads also makes sure that
  // every warp has read the pair before, whose stage is refilled.
  template <class From>
  __device__ __forceinline__ uint32_t wait_first(int32_t n, From from) {
    next_.find(n, from);
    ptx::cp_async_wait<0>();
    __syncthreads();
    const int32_t stage = stage_of(n);
    source_.look_ahead(stage + kStages, next_.at(Source::kAhead, n));
    if constexpr (kStages == 2) {
      skip(n);
      fill(next_.at(1, n), stage + 1);
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
      fill_first(next_.at(1, n), stage + 1);
    }
    if constexpr (kSkips) ++uses_;
    return second_address(stage);
  }

  // Called after the last pair, so that no copy outlives the thread block.
  __device__ __forceinline__ void finish() const { ptx::cp_async_wait<0>(); }

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
    if constexpr (kSkips) source_.template skip<First>(next_.at(1, n) - n - 1);
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
      : shared_(shared), source_(source) {}

  template <class From>
  __device__ __forceinline__ void start(int32_t n, From from) {
    next_.start(n, from);
    source_.template start<First, Second, kThreads>(0, [&](int i) { return next_.at(i, n); });
  }
  __device__ __forceinline__ int32_t next(int32_t n) { return next_.advance(n); }
  template <class From>
  __device__ __forceinline__ uint32_t wait_first(int32_t n, From from) {
    next_.find(n, from);
    source_.look_ahead(0, next_.at(Source::kAhead, n));
    return refill([&] { source_.template load_first<First, kThreads>(shared_, n, 0); });
  }
  __device__ __forceinline__ uint32_t wait_second(int32_t n) {
    const uint32_t tile = refill([&] { source_.template load_second<Second, kThreads>(shared_, n, 0); });
    if constexpr (kSkips) source_.template skip<First>(next_.at(1, n) - n - 1);
    return tile;
  }
  __device__ __forceinline__ void finish() const {}

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
