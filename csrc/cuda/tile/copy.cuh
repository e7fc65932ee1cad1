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

// Starts the copy of rows [first, first + Tile::kRows) into `shared`; rows from `end` on and unused columns
// are zero.
template <class Tile, int kThreads, class T>
__device__ __forceinline__ void load_tile(uint32_t shared, const GlobalRows<const T>& source, int32_t first,
                                          int32_t end) {
  const int64_t stride = source.stride;
  const T *data = source.data, *origin = data + first * stride;
  const int32_t columns = source.columns;
  constexpr int kTotal = Tile::kRows * Tile::kChunks;
#pragma unroll
  for (int i = 0; i < kTotal; i += kThreads) {
    const int at = i + static_cast<int>(threadIdx.x);
    const int row = at / Tile::kChunks, chunk = at % Tile::kChunks;
    const bool valid = row < end - first && chunk * kChunk<T> < columns;
    if (kTotal % kThreads == 0 || at < kTotal) {
      const T* from = valid ? origin + row * stride + chunk * kChunk<T> : data;
      ptx::cp_async_16(shared + Tile::offset(row, chunk), from, valid);
    }
  }
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
