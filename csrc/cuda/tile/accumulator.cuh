// Float32 accumulators in mma's C layout.
#pragma once

#include <cstdint>

#include "cuda/ptx/math.cuh"
#include "cuda/tile/shared_tile.cuh"

namespace jax_flash {

// Sets a lane's fragments of C to zero.
template <int kRowTiles, int kColumnTiles>
__device__ __forceinline__ void clear_fragments(float (&x)[kRowTiles][kColumnTiles][4]) {
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) x[m][n][i] = 0;
}

// [16 · kRowTiles, 8 · kColumnTiles] float32 of one warp. In every 16 × 8 tile lane l holds rows l / 4 and
// l / 4 + 8, and in each of them columns 2 · (l % 4) and 2 · (l % 4) + 1. A thread's rows are numbered by
// slot = 2 · row tile + half.
template <int RowTiles, int ColumnTiles>
struct Accumulator {
  static constexpr int kRowTiles = RowTiles, kColumnTiles = ColumnTiles;
  static constexpr int kSlots = 2 * RowTiles;
  static constexpr int kRows = 16 * RowTiles, kColumns = 8 * ColumnTiles;
  static constexpr bool kPairs = true;  // the elements (n, 0) and (n, 1) are adjacent
  static constexpr bool kPermuted = false, kTransposed = false;

  float x[RowTiles][ColumnTiles][4];

  __device__ __forceinline__ void clear() { clear_fragments(x); }

  // Indices within the accumulator: the row of a slot, the first of this lane's two columns in column tile n,
  // and the column of element (n, e).
  __device__ __forceinline__ static int row(int slot) {
    return slot / 2 * 16 + slot % 2 * 8 + static_cast<int>(threadIdx.x % 32 / 4);
  }
  __device__ __forceinline__ static int column(int n) {
    return n * 8 + static_cast<int>(threadIdx.x % 4) * 2;
  }
  __device__ __forceinline__ static int column(int n, int e) { return column(n) + e; }
  // row_step(slot) = row(slot) − row(0), and column_step(n, e) = column(n, e) − column(0)
  static constexpr int row_step(int slot) { return slot / 2 * 16 + slot % 2 * 8; }
  static constexpr int column_step(int n, int e = 0) { return n * 8 + e; }

  __device__ __forceinline__ void scale_row(int slot, float factor) {
#pragma unroll
    for (int n = 0; n < ColumnTiles; ++n) at(slot, n, 0) *= factor, at(slot, n, 1) *= factor;
  }

  __device__ __forceinline__ void add(const Accumulator& other) {
#pragma unroll
    for (int m = 0; m < RowTiles; ++m)
#pragma unroll
      for (int n = 0; n < ColumnTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) x[m][n][i] += other.x[m][n][i];
  }

  __device__ __forceinline__ float& at(int slot, int n, int i) { return x[slot / 2][n][slot % 2 * 2 + i]; }
  __device__ __forceinline__ float at(int slot, int n, int i) const {
    return x[slot / 2][n][slot % 2 * 2 + i];
  }
};

// The accumulator of a product whose columns are the rows of a permuted tile (SharedTile): a thread holds 8
// adjacent columns of every 32, in order.
template <int RowTiles, int ColumnTiles>
struct PermutedAccumulator : Accumulator<RowTiles, ColumnTiles> {
  static constexpr bool kPermuted = true;
  static_assert(ColumnTiles % 4 == 0);

  __device__ __forceinline__ static int column(int n) {
    return permuted(n * 8 + static_cast<int>(threadIdx.x % 4) * 2);
  }
  __device__ __forceinline__ static int column(int n, int e) { return column(n) + e; }
  static constexpr int column_step(int n, int e = 0) { return permuted(n * 8) + e; }
};

// S of a product that computes Sᵀ = K Qᵀ [16 · kKeyTiles, 8 · kQueryTiles]: x is in mma's C layout, and the
// functions below give it the interface of an Accumulator of S, so that masks, score variants and gradients
// are written once for both. A thread's queries are its slots; of its keys, (n, 0) and (n, 1) are 8 apart.
template <int kKeyTiles, int kQueryTiles>
struct TransposedAccumulator {
  static constexpr int kColumnTiles = kKeyTiles, kSlots = 2 * kQueryTiles;
  static constexpr int kRows = 8 * kQueryTiles, kColumns = 16 * kKeyTiles;
  static constexpr bool kPairs = false, kPermuted = false, kTransposed = true;

  float x[kKeyTiles][kQueryTiles][4];

  __device__ __forceinline__ void clear() { clear_fragments(x); }

  __device__ __forceinline__ static int row(int slot) {
    return row_step(slot) + static_cast<int>(threadIdx.x % 4) * 2;
  }
  static constexpr int row_step(int slot) { return slot / 2 * 8 + slot % 2; }
  __device__ __forceinline__ static int column(int n, int e = 0) {
    return column_step(n, e) + static_cast<int>(threadIdx.x % 32 / 4);
  }
  static constexpr int column_step(int n, int e = 0) { return n * 16 + e * 8; }

  __device__ __forceinline__ float& at(int slot, int n, int e) { return x[n][slot / 2][e * 2 + slot % 2]; }
  __device__ __forceinline__ float at(int slot, int n, int e) const {
    return x[n][slot / 2][e * 2 + slot % 2];
  }
};

// Calls f(x, slot, n, e) for every element of this thread, row by row.
template <class S, class F>
__device__ __forceinline__ void for_each(S& s, F f) {
#pragma unroll
  for (int slot = 0; slot < S::kSlots; ++slot)
#pragma unroll
    for (int n = 0; n < S::kColumnTiles; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) f(s.at(slot, n, e), slot, n, e);
}

// Zeroes the rows from `end` on.
template <class A>
__device__ __forceinline__ void clear_rows_from(int32_t end, A& a) {
  if (end >= A::kRows) return;
  for_each(a, [&](float& x, int slot, int, int) { x = A::row(slot) < end ? x : 0; });
}

// Which 16-row and 16-column blocks of a tile a warp's accumulator covers: the first, and the distance from
// one to the next.
struct Placement {
  int row, row_step, column, column_step;
};

// Rounds the accumulator to Tile::Element and stores it at `at` in a shared tile. `at` counts rows as mma
// reads them (Tile::row_of).
template <class Tile, class A>
__device__ __forceinline__ void store_accumulator(const A& a, uint8_t* shared, Placement at) {
  using T = typename Tile::Element;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int slot = 0; slot < A::kSlots; ++slot)
#pragma unroll
    for (int n = 0; n < A::kColumnTiles; ++n) {
      const int row = at.row + slot / 2 * at.row_step + slot % 2 * 8 + lane / 4;
      const int column = at.column + n / 2 * at.column_step + n % 2 * 8 + lane % 4 * 2;
      const int offset = Tile::offset(Tile::row_of(row), column / kChunk<T>) +
                         column % kChunk<T> * static_cast<int>(sizeof(T));
      ptx::store_pair(reinterpret_cast<T*>(shared + offset), a.at(slot, n, 0), a.at(slot, n, 1));
    }
}

}  // namespace jax_flash
