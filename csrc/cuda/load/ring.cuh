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
// either operand. Pairs are requested in ascending order, the first tile before the second.
template <int kStages, int kThreads, class First, class Second, class Source>
class TileRing {
 public:
  static constexpr int kBytes = ring_bytes(kStages, First::kBytes, Second::kBytes);

  __device__ __forceinline__ TileRing(uint32_t shared, const Source& source, const Interval& tiles)
      : shared_(shared), source_(source), tiles_(tiles) {}

  // Starts the first copies. Copies that the caller has issued before (Q) join their first group, and so
  // arrive with the first tile.
  __device__ __forceinline__ void start() {
    source_.template start<First, Second, kThreads>(tiles_.lo);
    if constexpr (kStages == 1) fill_first(tiles_.lo);
    for (int i = 0; i + 1 < kStages; ++i) fill(tiles_.lo + i);
  }

  // Waits for the first tile of pair `n` and returns its address. Its __syncthreads also makes sure that
  // every warp has read pair n - 1, whose stage is refilled.
  __device__ __forceinline__ uint32_t wait_first(int32_t n) {
    ptx::cp_async_wait<kStages == 1 ? 0 : kStages - 2>();
    __syncthreads();
    source_.look_ahead(n + kStages);
    if constexpr (kStages > 1) {
      fill(n + kStages - 1);
    } else {
      fill_second(n);
    }
    return first_address(n);
  }

  // Waits for the second tile of pair `n` and returns its address.
  __device__ __forceinline__ uint32_t wait_second(int32_t n) {
    if constexpr (kStages == 1) {
      ptx::cp_async_wait<0>();
      __syncthreads();
      fill_first(n + 1);
    }
    return second_address(n);
  }

  // Called after the last pair, so that no copy outlives the thread block.
  __device__ __forceinline__ void finish() const { ptx::cp_async_wait<0>(); }

 private:
  __device__ __forceinline__ uint32_t first_address(int32_t n) const {
    return shared_ + n % kStages * First::kBytes;
  }
  __device__ __forceinline__ uint32_t second_address(int32_t n) const {
    return shared_ + kStages * First::kBytes + n % kStages * Second::kBytes;
  }

  // Also called past the last tile, for which the source reads nothing: a branch here would keep the copies
  // from overlapping the product.
  __device__ __forceinline__ void fill(int32_t n) {
    source_.template load_first<First, kThreads>(first_address(n), n);
    source_.template load_second<Second, kThreads>(second_address(n), n);
    ptx::cp_async_commit();
  }
  __device__ __forceinline__ void fill_first(int32_t n) {
    if (n < tiles_.hi) source_.template load_first<First, kThreads>(first_address(n), n);
    ptx::cp_async_commit();
  }
  __device__ __forceinline__ void fill_second(int32_t n) {
    if (n < tiles_.hi) source_.template load_second<Second, kThreads>(second_address(n), n);
    ptx::cp_async_commit();
  }

  uint32_t shared_;
  Source source_;
  const Interval& tiles_;
};

// Without stages both tiles share one buffer.
template <int kThreads, class First, class Second, class Source>
class TileRing<0, kThreads, First, Second, Source> {
 public:
  static constexpr int kBytes = ring_bytes(0, First::kBytes, Second::kBytes);

  __device__ __forceinline__ TileRing(uint32_t shared, const Source& source, const Interval& tiles)
      : shared_(shared), source_(source), first_(tiles.lo) {}

  __device__ __forceinline__ void start() { source_.template start<First, Second, kThreads>(first_); }
  __device__ __forceinline__ uint32_t wait_first(int32_t n) {
    source_.look_ahead(n);
    return refill([&] { source_.template load_first<First, kThreads>(shared_, n); });
  }
  __device__ __forceinline__ uint32_t wait_second(int32_t n) {
    return refill([&] { source_.template load_second<Second, kThreads>(shared_, n); });
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
