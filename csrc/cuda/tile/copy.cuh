// Copies of [rows, columns] tiles between global memory and swizzled shared memory, 16 bytes at a time.
#pragma once

#include <cstdint>

#include "cuda/ptx/cp_async.cuh"
#include "cuda/tile/shared_tile.cuh"

namespace jax_flash {

// Rows of a head: T elements, `columns` of them used (a multiple of 8), `stride` elements from row to row.
template <class T>
struct GlobalRows {
  T* data;
  int64_t stride;
  int32_t columns;
};

// What a thread copies of a tile: a chunk in every kBeside-th panel of the rows that lie kStep apart.
template <class Tile, int kThreads>
struct ThreadShare {
  static constexpr int kPanel = Tile::kPanel, kPanels = Tile::kChunks / kPanel;
  static constexpr int kStep = kThreads / kPanel < Tile::kRows ? kThreads / kPanel : Tile::kRows;
  static constexpr int kBeside = kThreads / (kPanel * kStep);

  // The first row and chunk, and their place.
  __device__ __forceinline__ static int row() { return static_cast<int>(threadIdx.x / kPanel % kStep); }
  __device__ __forceinline__ static int chunk() {
    return static_cast<int>(threadIdx.x / (kPanel * kStep) * kPanel + threadIdx.x % kPanel);
  }
  __device__ __forceinline__ static uint32_t place() { return Tile::offset(row(), chunk()); }

  // Where the thread's first chunk of a row lies; rows that are not used are zeros.
  struct Row {
    const typename Tile::Element* from;
    bool used;
  };
  // Starts the copy of the rows that `find`(r) tells for row() + r, r a constant that ascends. Columns from
  // `columns` on are zeros.
  template <class Find>
  __device__ __forceinline__ static void load(uint32_t tile, uint32_t place, int32_t columns, Find find) {
    using T = typename Tile::Element;
    const int32_t left = columns - chunk() * kChunk<T>;
#pragma unroll
    for (int r = 0; r < Tile::kRows; r += kStep) {
      const Row own = find(r);
      const uint32_t to = tile + (place ^ Tile::key(r) << 4);  // the key of row() + r is that of both
#pragma unroll
      for (int panel = 0; panel < kPanels; panel += kBeside) {
        const int column = panel * kPanel * kChunk<T>;
        const bool inside = (Tile::kRows % kStep == 0 || row() + r < Tile::kRows) &&
                            (kPanels % kBeside == 0 || chunk() < (kPanels - panel) * kPanel);
        if (inside)
          ptx::cp_async_16(to + (r * Tile::kPitch + Tile::panel_offset(panel * kPanel)), own.from + column,
                           own.used && column < left);
      }
    }
  }

 private:
  static constexpr bool keys_add_up() {
    for (int r = 0; r < Tile::kRows; r += kStep)
      for (int row = 0; row < kStep && row + r < Tile::kRows; ++row)
        if (Tile::key(row + r) != (Tile::key(row) ^ Tile::key(r))) return false;
    return true;
  }
  static_assert(keys_add_up());
};

// Starts the copy of rows [first, first + Tile::kRows) into `shared`; unused columns are zero, and rows that
// `used`(row, r) denies for row + r of the tile: r is a constant, `row` the thread's own.
template <class Tile, int kThreads, class T, class Used>
__device__ __forceinline__ void load_tile_where(uint32_t shared, const GlobalRows<const T>& source,
                                                int32_t first, Used used) {
  using Share = ThreadShare<Tile, kThreads>;
  const int row = Share::row();
  const auto stride = static_cast<uint32_t>(source.stride);  // one token's elements
  const T* from =
      source.data + uint64_t{static_cast<uint32_t>(first + row)} * stride + Share::chunk() * kChunk<T>;
  Share::load(shared, Share::place(), source.columns, [&](int r) {
    const typename Share::Row own{from, used(row, r)};
    from += uint64_t{stride} * Share::kStep;
    return own;
  });
}

// As above; rows from `end` on are zero.
template <class Tile, int kThreads, class T>
__device__ __forceinline__ void load_tile(uint32_t shared, const GlobalRows<const T>& source, int32_t first,
                                          int32_t end) {
  load_tile_where<Tile, kThreads>(shared, source, first,
                                  [=](int row, int r) { return r < end - first - row; });
}

// Copies rows [row, row + kRows) of a shared tile to rows [first, end) in global memory, as thread `thread`
// of `kThreads`.
template <class Tile, int kRows, int kThreads, class T>
__device__ __forceinline__ void store_tile(const uint8_t* shared, int row, const GlobalRows<T>& to,
                                           int32_t first, int32_t end, int thread) {
  for (int at = thread; at < kRows * Tile::kChunks; at += kThreads) {
    const int r = at / Tile::kChunks, chunk = at % Tile::kChunks;
    if (r < end - first && chunk * kChunk<T> < to.columns) {
      const uint4 x = *reinterpret_cast<const uint4*>(shared + Tile::offset(row + r, chunk));
      *reinterpret_cast<uint4*>(to.data + (int64_t{first} + r) * to.stride + chunk * kChunk<T>) = x;
    }
  }
}

}  // namespace jax_flash
