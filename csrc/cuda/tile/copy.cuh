// Copies of [rows, columns] tiles between global memory and swizzled shared memory, 16 bytes at a time.
#pragma once

#include <cstdint>

#include "cuda/ptx/cp_async.cuh"
#include "cuda/tile/shared_tile.cuh"

namespace jax_flash {

// The rows of one head in global memory, with a stride of `stride` elements. Their first `columns` columns
// are used (a multiple of 8).
template <class T>
struct GlobalRows {
  T* data;
  int64_t stride;
  int32_t columns;

  // Drops the first `count` columns, possibly all of them. `size`: of an element, in T.
  __device__ __forceinline__ void skip_columns(int32_t count, int32_t size = 1) {
    data += count * size, columns -= count;
  }
};

// The chunks of a tile that a thread copies: one chunk of every kPanelsAtOnce-th panel, in every kStep-th
// row.
template <class Tile, int kThreads>
struct ThreadShare {
  static constexpr int kPanel = Tile::kPanel, kPanels = Tile::kChunks / kPanel;
  static constexpr int kStep = kThreads / kPanel < Tile::kRows ? kThreads / kPanel : Tile::kRows;
  static constexpr int kPanelsAtOnce = kThreads / (kPanel * kStep);
  static_assert(Tile::kChunks % kPanel == 0);

  // The thread's first row, its chunk there, and that chunk's byte offset in the tile.
  __device__ __forceinline__ static int row() { return static_cast<int>(threadIdx.x / kPanel % kStep); }
  __device__ __forceinline__ static int chunk() {
    return static_cast<int>(threadIdx.x / (kPanel * kStep) * kPanel + threadIdx.x % kPanel);
  }
  __device__ __forceinline__ static uint32_t offset() { return Tile::offset(row(), chunk()); }

  // The global address of the thread's first chunk of a row. Unused rows become zeros.
  struct Row {
    const typename Tile::Element* from;
    bool used;
  };
  // Starts the thread's copies. find(r) returns the Row for tile row row() + r; it is called with ascending
  // compile-time constants. Columns from `columns` on become zeros.
  template <class Find>
  __device__ __forceinline__ static void load(uint32_t tile, uint32_t offset, int32_t columns, Find find) {
    using T = typename Tile::Element;
    const int32_t columns_left = columns - chunk() * kChunk<T>;
#pragma unroll
    for (int r = 0; r < Tile::kRows; r += kStep) {
      const Row source = find(r);
      // swizzle(row() + r) = swizzle(row()) ^ swizzle(r), and `offset` contains swizzle(row()).
      const uint32_t to = tile + (offset ^ Tile::swizzle(r) << 4);
#pragma unroll
      for (int panel = 0; panel < kPanels; panel += kPanelsAtOnce) {
        const int column = panel * kPanel * kChunk<T>;
        const bool inside = (Tile::kRows % kStep == 0 || row() + r < Tile::kRows) &&
                            (kPanels % kPanelsAtOnce == 0 || chunk() < (kPanels - panel) * kPanel);
        if (inside)
          ptx::cp_async_16(to + (r * Tile::kPitch + Tile::panel_offset(panel * kPanel)), source.from + column,
                           source.used && column < columns_left);
      }
    }
  }

 private:
  static constexpr bool swizzle_is_linear() {
    for (int r = 0; r < Tile::kRows; r += kStep)
      for (int row = 0; row < kStep && row + r < Tile::kRows; ++row)
        if (Tile::swizzle(row + r) != (Tile::swizzle(row) ^ Tile::swizzle(r))) return false;
    return true;
  }
  static_assert(swizzle_is_linear());
};

// Starts the copy of rows [first, first + Tile::kRows) into the tile at `shared`. Unused columns become
// zeros, and so do the rows row + r of the tile for which used(row, r) is false; `row` depends on the thread,
// r is a compile-time constant.
template <class Tile, int kThreads, class T, class Used>
__device__ __forceinline__ void load_tile_where(uint32_t shared, const GlobalRows<const T>& source,
                                                int32_t first, Used used) {
  using Share = ThreadShare<Tile, kThreads>;
  const int row = Share::row();
  const auto stride = static_cast<uint32_t>(source.stride);  // the elements of one token fit in 32 bits
  const T* from =
      source.data + uint64_t{static_cast<uint32_t>(first + row)} * stride + Share::chunk() * kChunk<T>;
  Share::load(shared, Share::offset(), source.columns, [&](int r) {
    const typename Share::Row current{from, used(row, r)};
    from += uint64_t{stride} * Share::kStep;
    return current;
  });
}

// Starts the copy of rows [first, first + Tile::kRows); rows from `end` on become zeros.
template <class Tile, int kThreads, class T>
__device__ __forceinline__ void load_tile(uint32_t shared, const GlobalRows<const T>& source, int32_t first,
                                          int32_t end) {
  load_tile_where<Tile, kThreads>(shared, source, first,
                                  [=](int row, int r) { return r < end - first - row; });
}

// Copies rows [row, row + kRows) of a shared tile to global rows [first, end), of which those from `used` on
// become zeros. This is the share of thread `thread` among kThreads.
template <class Tile, int kRows, int kThreads, class T>
__device__ __forceinline__ void store_tile(const uint8_t* shared, int row, const GlobalRows<T>& to,
                                           int32_t first, int32_t used, int32_t end, int thread) {
  for (int at = thread; at < kRows * Tile::kChunks; at += kThreads) {
    const int r = at / Tile::kChunks, chunk = at % Tile::kChunks;
    if (r < end - first && chunk * kChunk<T> < to.columns) {
      uint4 x = *reinterpret_cast<const uint4*>(shared + Tile::offset(row + r, chunk));
      if (r >= used - first) x = {0, 0, 0, 0};
      *reinterpret_cast<uint4*>(to.data + (int64_t{first} + r) * to.stride + chunk * kChunk<T>) = x;
    }
  }
}

}  // namespace jax_flash
