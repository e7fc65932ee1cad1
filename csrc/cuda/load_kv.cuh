// A ring of pairs of tiles, K and V, in shared memory, filled by cp.async some pairs ahead of the products.
//
// Copies are committed in the order first 0, second 0, first 1, second 1 …, one group each, empty past the
// last tile, so that waiting for a tile is waiting until 2 · (stages − 1) newer groups are left.
#pragma once

#include "core/band.h"
#include "cuda/tile/copy.cuh"

namespace jax_flash {

template <int kRows, int kStages, int kThreads, class First, class Second>
class TileRing {
 public:
  using T = typename First::Element;
  static constexpr int kBytes = kStages * (First::kBytes + Second::kBytes);

  // `tiles` of kRows keys each; keys from `end` on read as zeros. The references are to shared memory.
  __device__ __forceinline__ TileRing(uint32_t shared, const GlobalRows<const T>& first,
                                      const GlobalRows<const T>& second, const Interval& tiles,
                                      const int32_t& end)
      : shared_(shared), first_(first), second_(second), tiles_(tiles), end_(end) {}

  // Joins the first group: what the caller loaded before (Q) arrives with the first tile.
  __device__ __forceinline__ void start() {
    for (int i = 0; i < kStages; ++i) {
      fill_first(tiles_.lo + i);
      if (i + 1 < kStages) fill_second(tiles_.lo + i);
    }
  }

  // The first tile of pair `n`. Everyone has left the second of the pair before it, whose place is refilled.
  __device__ __forceinline__ uint32_t wait_first(int32_t n) {
    ptx::cp_async_wait<2 * (kStages - 1)>();
    __syncthreads();
    fill_second(n + kStages - 1);
    return first_place(n);
  }

  // The second tile of pair `n`. Everyone has left the first, whose place is refilled.
  __device__ __forceinline__ uint32_t wait_second(int32_t n) {
    ptx::cp_async_wait<2 * (kStages - 1)>();
    __syncthreads();
    fill_first(n + kStages);
    return second_place(n);
  }

 private:
  __device__ __forceinline__ uint32_t first_place(int32_t n) const {
    return shared_ + n % kStages * First::kBytes;
  }
  __device__ __forceinline__ uint32_t second_place(int32_t n) const {
    return shared_ + kStages * First::kBytes + n % kStages * Second::kBytes;
  }

  __device__ __forceinline__ void fill_first(int32_t n) {
    if (n < tiles_.hi) load_tile<First, kThreads>(first_place(n), first_, n * kRows, end_);
    ptx::cp_async_commit();
  }
  __device__ __forceinline__ void fill_second(int32_t n) {
    if (n < tiles_.hi) load_tile<Second, kThreads>(second_place(n), second_, n * kRows, end_);
    ptx::cp_async_commit();
  }

  uint32_t shared_;
  const GlobalRows<const T>&first_, &second_;
  const Interval& tiles_;
  const int32_t& end_;
};

}  // namespace jax_flash
