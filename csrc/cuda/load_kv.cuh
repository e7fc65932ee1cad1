// A ring of pairs of tiles, K and V, in shared memory, filled by cp.async some pairs ahead of the products.
//
// With several stages a pair arrives together, behind one barrier. With one stage the two tiles take turns:
// each is copied while the other is multiplied, and each has a barrier. With none they share one place, and
// each is copied when the other has been multiplied: for small shared memory and, on sm_75, copies that are
// done at once.
#pragma once

#include "core/band.h"
#include "cuda/tile/copy.cuh"

namespace jax_flash {

// Where a ring's tiles come from: rows that lie side by side, those from `end` on read as zeros. The
// references are to shared memory. Pairs of tiles are asked for in order, the first before the second.
// kRunning: what a thread copies next is kept in registers, of which plain kernels have none.
template <class T, bool kRunning = false>
class RowSource {
 public:
  __device__ __forceinline__ RowSource(const GlobalRows<const T>& first, const GlobalRows<const T>& second,
                                       const int32_t& end)
      : first_(first), second_(second), end_(end) {}

  template <class Tile, int kThreads>
  __device__ __forceinline__ void load_first(uint32_t shared, int32_t n) {
    load<Tile, kThreads>(shared, first_, n, next_first_);
  }
  template <class Tile, int kThreads>
  __device__ __forceinline__ void load_second(uint32_t shared, int32_t n) {
    load<Tile, kThreads>(shared, second_, n, next_second_);
    left_ -= Tile::kRows;
  }
  // Called by all threads before tiles [n, n + kStages) are loaded, and a barrier before tile n is.
  template <class First, class Second, int kThreads>
  __device__ __forceinline__ void start(int32_t n) {
    using Share = ThreadShare<First, kThreads>;
    static_assert(First::kPanel == Second::kPanel && First::kRows == Second::kRows);
    if constexpr (kRunning) {
      const int32_t row = n * First::kRows + Share::row();
      next_first_ = begin<First, kThreads>(first_, row), next_second_ = begin<Second, kThreads>(second_, row);
      left_ = end_ - row;
      // Through a shuffle, or the compiler would compute it anew at every tile.
      place_ = __shfl_sync(~0u, Share::place(), threadIdx.x % 32);
    }
  }
  __device__ __forceinline__ void look_ahead(int32_t) const {}

 private:
  template <class Tile, int kThreads>
  __device__ __forceinline__ static const T* begin(const GlobalRows<const T>& rows, int32_t row) {
    const uint64_t offset = uint64_t{static_cast<uint32_t>(row)} * static_cast<uint32_t>(rows.stride);
    return rows.data + offset + ThreadShare<Tile, kThreads>::chunk() * kChunk<T>;
  }
  template <class Tile, int kThreads>
  __device__ __forceinline__ void load(uint32_t shared, const GlobalRows<const T>& rows, int32_t n,
                                       const T*& next) const {
    using Share = ThreadShare<Tile, kThreads>;
    const auto stride = static_cast<uint32_t>(rows.stride);
    const int32_t first_row = n * Tile::kRows + Share::row(), left = kRunning ? left_ : end_ - first_row;
    const T* row = kRunning ? next : begin<Tile, kThreads>(rows, first_row);
    Share::load(shared, kRunning ? place_ : Share::place(), rows.columns, [&](int r) {
      const typename Share::Row own{row, r < left};
      row += uint64_t{stride} * Share::kStep;
      return own;
    });
    if (kRunning) next += uint64_t{stride} * Tile::kRows;
  }

  const GlobalRows<const T>&first_, &second_;
  const int32_t& end_;
  const T *next_first_ = nullptr, *next_second_ = nullptr;
  int32_t left_ = 0;  // rows of the next pair from the thread's own to the end
  uint32_t place_ = 0;
};

template <int kStages, int kThreads, class First, class Second, class Source>
class TileRing {
 public:
  static constexpr int kBytes = kStages * (First::kBytes + Second::kBytes);

  __device__ __forceinline__ TileRing(uint32_t shared, const Source& source, const Interval& tiles)
      : shared_(shared), source_(source), tiles_(tiles) {}

  // Joins the first group: what the caller loaded before (Q) arrives with the first tile.
  __device__ __forceinline__ void start() {
    source_.template start<First, Second, kThreads>(tiles_.lo);
    if constexpr (kStages == 1) fill_first(tiles_.lo);
    for (int i = 0; i + 1 < kStages; ++i) fill(tiles_.lo + i);
  }

  // The first tile of pair `n`. Everyone has left the pair before it, whose place is refilled.
  __device__ __forceinline__ uint32_t wait_first(int32_t n) {
    ptx::cp_async_wait<kStages == 1 ? 0 : kStages - 2>();
    __syncthreads();
    source_.look_ahead(n + kStages);
    if constexpr (kStages > 1) {
      fill(n + kStages - 1);
    } else {
      fill_second(n);
    }
    return first_place(n);
  }

  // The second tile of pair `n`.
  __device__ __forceinline__ uint32_t wait_second(int32_t n) {
    if constexpr (kStages == 1) {
      ptx::cp_async_wait<0>();
      __syncthreads();
      fill_first(n + 1);
    }
    return second_place(n);
  }

  // After the last pair: no copy outlives the block.
  __device__ __forceinline__ void finish() const { ptx::cp_async_wait<0>(); }

 private:
  __device__ __forceinline__ uint32_t first_place(int32_t n) const {
    return shared_ + n % kStages * First::kBytes;
  }
  __device__ __forceinline__ uint32_t second_place(int32_t n) const {
    return shared_ + kStages * First::kBytes + n % kStages * Second::kBytes;
  }

  // Past the last tile too: a branch would keep the copies from running beside the product. Rows from the
  // source's end on are not read.
  __device__ __forceinline__ void fill(int32_t n) {
    source_.template load_first<First, kThreads>(first_place(n), n);
    source_.template load_second<Second, kThreads>(second_place(n), n);
    ptx::cp_async_commit();
  }
  __device__ __forceinline__ void fill_first(int32_t n) {
    if (n < tiles_.hi) source_.template load_first<First, kThreads>(first_place(n), n);
    ptx::cp_async_commit();
  }
  __device__ __forceinline__ void fill_second(int32_t n) {
    if (n < tiles_.hi) source_.template load_second<Second, kThreads>(second_place(n), n);
    ptx::cp_async_commit();
  }

  uint32_t shared_;
  Source source_;
  const Interval& tiles_;
};

template <int kThreads, class First, class Second, class Source>
class TileRing<0, kThreads, First, Second, Source> {
 public:
  static constexpr int kBytes = First::kBytes > Second::kBytes ? First::kBytes : Second::kBytes;

  __device__ __forceinline__ TileRing(uint32_t shared, const Source& source, const Interval& tiles)
      : shared_(shared), source_(source), first_(tiles.lo) {}

  __device__ __forceinline__ void start() { source_.template start<First, Second, kThreads>(first_); }
  __device__ __forceinline__ uint32_t wait_first(int32_t n) {
    source_.look_ahead(n);
    return in_turn([&] { source_.template load_first<First, kThreads>(shared_, n); });
  }
  __device__ __forceinline__ uint32_t wait_second(int32_t n) {
    return in_turn([&] { source_.template load_second<Second, kThreads>(shared_, n); });
  }
  __device__ __forceinline__ void finish() const {}

 private:
  template <class Load>
  __device__ __forceinline__ uint32_t in_turn(Load load) {
    __syncthreads();  // everyone has left the tile before
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
