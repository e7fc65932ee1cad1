// The loader of the dense layouts: it fills the tile ring of load/ring.cuh with keys and values that are
// contiguous in global memory.
#pragma once

#include <cstdint>

#include "cuda/tile/copy.cuh"

namespace jax_flash {

// Two operands with one row per token, for example K and V. Rows from `end` on are read as zeros. The
// references point to shared memory. Tiles are loaded in ascending order, the first operand's before the
// second's. kRunning: each thread keeps its next source addresses in registers, which saves integer work per
// tile; only kernels with registers to spare set it.
template <class T, bool kRunning = false>
class RowSource {
 public:
  static constexpr int kAhead = 1;  // tiles after the current one whose numbers must be known

  __device__ __forceinline__ RowSource(const GlobalRows<const T>& first, const GlobalRows<const T>& second,
                                       const int32_t& end)
      : first_(first), second_(second), end_(end) {}

  template <class Tile, int kThreads>
  __device__ __forceinline__ void load_first(uint32_t shared, int32_t n, int32_t) {
    load<Tile, kThreads>(shared, first_, n, next_first_);
  }
  template <class Tile, int kThreads>
  __device__ __forceinline__ void load_second(uint32_t shared, int32_t n, int32_t) {
    load<Tile, kThreads>(shared, second_, n, next_second_);
    rows_left_ -= Tile::kRows;
  }
  // Called by all threads before the first load, of tile tile_at(0).
  template <class First, class Second, int kThreads, class TileAt>
  __device__ __forceinline__ void start(int32_t, TileAt tile_at) {
    using Share = ThreadShare<First, kThreads>;
    static_assert(First::kPanel == Second::kPanel && First::kRows == Second::kRows);
    if constexpr (kRunning) {
      const int32_t row = tile_at(0) * First::kRows + Share::row();
      next_first_ = begin<First, kThreads>(first_, row), next_second_ = begin<Second, kThreads>(second_, row);
      rows_left_ = end_ - row;
      // The shuffle keeps the compiler from computing the offset again for every tile.
      offset_ = __shfl_sync(~0u, Share::offset(), threadIdx.x % 32);
    }
  }
  // Skips this many tiles before the next load.
  template <class Tile>
  __device__ __forceinline__ void skip(int32_t tiles) {
    if (!kRunning || tiles == 0) return;
    const int32_t rows = tiles * Tile::kRows;
    next_first_ += uint64_t{static_cast<uint32_t>(rows)} * static_cast<uint32_t>(first_.stride);
    next_second_ += uint64_t{static_cast<uint32_t>(rows)} * static_cast<uint32_t>(second_.stride);
    rows_left_ -= rows;
  }
  __device__ __forceinline__ int32_t* numbers() const { return nullptr; }
  // Only the page loader reads ahead.
  __device__ __forceinline__ void look_ahead(int32_t, int32_t) const {}

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
    const int32_t first_row = n * Tile::kRows + Share::row(), left = kRunning ? rows_left_ : end_ - first_row;
    const T* row = kRunning ? next : begin<Tile, kThreads>(rows, first_row);
    Share::load(shared, kRunning ? offset_ : Share::offset(), rows.columns, [&](int r) {
      const typename Share::Row source{row, r < left};
      row += uint64_t{stride} * Share::kStep;
      return source;
    });
    if (kRunning) next += uint64_t{stride} * Tile::kRows;
  }

  const GlobalRows<const T>&first_, &second_;
  const int32_t& end_;
  const T *next_first_ = nullptr, *next_second_ = nullptr;
  int32_t rows_left_ = 0;  // rows from this thread's first row of the next tiles to `end`
  uint32_t offset_ = 0;    // offset of this thread's first chunk in a shared tile
};

}  // namespace jax_flash
