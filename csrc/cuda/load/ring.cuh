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

// First, Second: the SharedTile types of a pair. Source: RowSource or PageSource, which copies tile n of
// either operand. Pairs are requested in ascending order, the first tile before the second. kSkips: the
// caller may skip pairs, and passes the number of the pair that comes next.
template <int kStages, int kThreads, class First, class Second, class Source, bool kSkips = false>
class TileRing {
  static_assert(kStages <= 2);

 public:
  static constexpr int kBytes = ring_bytes(kStages, First::kBytes, Second::kBytes);

  __device__ __forceinline__ TileRing(uint32_t shared, const Source& source, const Interval& tiles)
      : shared_(shared), source_(source), tiles_(tiles) {}

  // Starts the copies of the first pair. Copies that the caller has issued before (Q) join their first group,
  // and so arrive with the first tile.
  __device__ __forceinline__ void start() { start(tiles_.lo); }
  __device__ __forceinline__ void start(int32_t n) {
    source_.template start<First, Second, kThreads>(n);
    if constexpr (kStages == 1) fill_first(n, stage_of(n));
    if constexpr (kStages == 2) fill(n, stage_of(n));
  }

  // Waits for the first tile of pair `n` and returns its address. `next`: the pair after it. Its
  // __syncthreads also makes sure that every warp has read the pair before, whose stage is refilled.
  __device__ __forceinline__ uint32_t wait_first(int32_t n) { return wait_first(n, n + 1); }
  __device__ __forceinline__ uint32_t wait_first(int32_t n, int32_t next) {
    ptx::cp_async_wait<0>();
    __syncthreads();
    source_.look_ahead(n + kStages);
    const int32_t stage = stage_of(n);
    if constexpr (kStages == 2) {
      skip(n, next);
      fill(next, stage + 1);
    } else {
      fill_second(n, stage);
    }
    return first_address(stage);
  }

  // Waits for the second tile of pair `n` and returns its address.
  __device__ __forceinline__ uint32_t wait_second(int32_t n) { return wait_second(n, n + 1); }
  __device__ __forceinline__ uint32_t wait_second(int32_t n, int32_t next) {
    const int32_t stage = stage_of(n);
    if constexpr (kStages == 1) {
      ptx::cp_async_wait<0>();
      __syncthreads();
      skip(n, next);
      fill_first(next, stage + 1);
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
  __device__ __forceinline__ void skip(int32_t n, int32_t next) {
    if constexpr (kSkips) source_.template skip<First>(next - n - 1);
  }

  // Also called past the last tile, for which the source reads nothing: a branch here would keep the copies
  // from overlapping the product.
  __device__ __forceinline__ void fill(int32_t n, int32_t stage) {
    source_.template load_first<First, kThreads>(first_address(stage), n);
    source_.template load_second<Second, kThreads>(second_address(stage), n);
    ptx::cp_async_commit();
  }
  __device__ __forceinline__ void fill_first(int32_t n, int32_t stage) {
    if (n < tiles_.hi) source_.template load_first<First, kThreads>(first_address(stage), n);
    ptx::cp_async_commit();
  }
  __device__ __forceinline__ void fill_second(int32_t n, int32_t stage) {
    if (n < tiles_.hi) source_.template load_second<Second, kThreads>(second_address(stage), n);
    ptx::cp_async_commit();
  }

  uint32_t shared_;
  Source source_;
  const Interval& tiles_;
  int32_t uses_ = 0;  // with kSkips: the pairs before this one
};

// Without stages both tiles share one buffer.
template <int kThreads, class First, class Second, class Source, bool kSkips>
class TileRing<0, kThreads, First, Second, Source, kSkips> {
 public:
  static constexpr int kBytes = ring_bytes(0, First::kBytes, Second::kBytes);

  __device__ __forceinline__ TileRing(uint32_t shared, const Source& source, const Interval& tiles)
      : shared_(shared), source_(source), first_(tiles.lo) {}

  __device__ __forceinline__ void start() { start(first_); }
  __device__ __forceinline__ void start(int32_t n) { source_.template start<First, Second, kThreads>(n); }
  __device__ __forceinline__ uint32_t wait_first(int32_t n) { return wait_first(n, n + 1); }
  __device__ __forceinline__ uint32_t wait_first(int32_t n, int32_t) {
    source_.look_ahead(n);
    return refill([&] { source_.template load_first<First, kThreads>(shared_, n); });
  }
  __device__ __forceinline__ uint32_t wait_second(int32_t n) { return wait_second(n, n + 1); }
  __device__ __forceinline__ uint32_t wait_second(int32_t n, int32_t next) {
    const uint32_t tile = refill([&] { source_.template load_second<Second, kThreads>(shared_, n); });
    if constexpr (kSkips) source_.template skip<First>(next - n - 1);
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
  int32_t first_;
};

}  // namespace jax_flash
