// The operands of mma.sync. load(fragment, tile, k) loads the fragment for k step k, which covers 32 bytes of
// K. In A, `tile` counts tiles of 16 rows. In B it counts tiles of 8 columns, and the fragment has two of
// them.
//
// RowsA, RowsB: a K-major tile in shared memory, one row per row of A or column of B.
// ColumnsA, ColumnsB: an MN-major tile in shared memory, one row per k. Successive blocks of 16 rows of A or
// columns of B lie kDistance columns apart.
#pragma once

#include <cstdint>

#include "cuda/ptx/ldmatrix.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/tile/shared_tile.cuh"

namespace jax_flash {

// Elements of K in a step.
template <class T>
inline constexpr int kStepK = 32 / static_cast<int>(sizeof(T));

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x % 32); }

template <class Tile>
struct RowsA {
  static constexpr bool kInRegisters = false;
  LaneAddress<Tile> lane;
  RowsA() = default;
  __device__ __forceinline__ RowsA(uint32_t tile, int row)
      : lane(tile, row + (lane_id() & 15), lane_id() >> 4) {}
  __device__ __forceinline__ void load(uint32_t (&a)[4], int m, int k) const {
    ptx::ldmatrix_x4(a, lane.at(16 * m, 2 * k));
  }
};

template <class Tile>
struct RowsB {
  LaneAddress<Tile> lane;
  __device__ __forceinline__ RowsB(uint32_t tile, int row)
      : lane(tile, row + Tile::row_of((lane_id() & 7) + (lane_id() >> 4) * 8), lane_id() >> 3 & 1) {}
  __device__ __forceinline__ void load(uint32_t (&b)[4], int n, int k) const {
    ptx::ldmatrix_x4(b, lane.at(Tile::row_of(8 * n), 2 * k));
  }
};

// float32 has no transposing ldmatrix, so its MN-major operands are loaded word by word. Both operands of a
// product must have the same order of k. If the other one is K-major, lane t holds k = t and t + 4. If it
// comes from registers or is MN-major too, lane t holds k = 2t and 2t + 1 (kPairs).
template <class Tile, bool kPairs>
struct ColumnWords {
  LaneAddress<Tile> even, odd;
  __device__ __forceinline__ ColumnWords(uint32_t tile, int column)
      : even(lane(tile, column, 0)), odd(lane(tile, column, 1)) {}
  __device__ __forceinline__ static LaneAddress<Tile> lane(uint32_t tile, int column, int second) {
    const int t = lane_id() % 4, g = lane_id() / 4;
    LaneAddress<Tile> at(tile, Tile::row_of(kPairs ? 2 * t + second : t + 4 * second), column / 4 + g / 4);
    at.base += g % 4 * 4;
    return at;
  }
  // low, high: columns g and g + 8 of the block of 16 columns at `chunk`, for both k of the lane (g = lane /
  // 4).
  __device__ __forceinline__ void load(uint32_t (&low)[2], uint32_t (&high)[2], int chunk, int k) const {
    low[0] = ptx::load_shared(even.at(Tile::row_of(8 * k), chunk));
    low[1] = ptx::load_shared(odd.at(Tile::row_of(8 * k), chunk));
    high[0] = ptx::load_shared(even.at(Tile::row_of(8 * k), chunk + 2));
    high[1] = ptx::load_shared(odd.at(Tile::row_of(8 * k), chunk + 2));
  }
};

// B [K, columns] from `column` on.
template <class Tile, int kDistance, bool kPairs = true>
struct ColumnsB {
  LaneAddress<Tile> lane;
  __device__ __forceinline__ ColumnsB(uint32_t tile, int column)
      : lane(tile, Tile::row_of(lane_id() & 15), column / 8 + (lane_id() >> 4)) {}
  __device__ __forceinline__ void load(uint32_t (&b)[4], int n, int k) const {
    ptx::ldmatrix_x4_trans(b, lane.at(Tile::row_of(16 * k), n / 2 * (kDistance / 8)));
  }
};

template <int kRows, int kColumns, bool kPermuted, int kDistance, bool kPairs>
struct ColumnsB<SharedTile<float, kRows, kColumns, kPermuted>, kDistance, kPairs> {
  ColumnWords<SharedTile<float, kRows, kColumns, kPermuted>, kPairs> words;
  __device__ __forceinline__ ColumnsB(uint32_t tile, int column) : words(tile, column) {}
  __device__ __forceinline__ void load(uint32_t (&b)[4], int n, int k) const {
    uint32_t low[2], high[2];
    words.load(low, high, n / 2 * (kDistance / 4), k);
    b[0] = low[0], b[1] = low[1], b[2] = high[0], b[3] = high[1];
  }
};

// A [columns, K] from `column` on.
template <class Tile, int kDistance>
struct ColumnsA {
  static constexpr bool kInRegisters = false;
  LaneAddress<Tile> lane;
  __device__ __forceinline__ ColumnsA(uint32_t tile, int column)
      : lane(tile, (lane_id() & 7) + (lane_id() >> 4) * 8, column / 8 + (lane_id() >> 3 & 1)) {}
  __device__ __forceinline__ void load(uint32_t (&a)[4], int m, int k) const {
    ptx::ldmatrix_x4_trans(a, lane.at(16 * k, m * (kDistance / 8)));
  }
};

template <int kRows, int kColumns, int kDistance>
struct ColumnsA<SharedTile<float, kRows, kColumns>, kDistance> {
  static constexpr bool kInRegisters = false;
  ColumnWords<SharedTile<float, kRows, kColumns>, true> words;
  __device__ __forceinline__ ColumnsA(uint32_t tile, int column) : words(tile, column) {}
  __device__ __forceinline__ void load(uint32_t (&a)[4], int m, int k) const {
    uint32_t low[2], high[2];
    words.load(low, high, m * (kDistance / 4), k);
    a[0] = low[0], a[1] = high[0], a[2] = low[1], a[3] = high[1];
  }
};

// A [16 · RowTiles, kStepK<T> · Steps] as fragments.
template <class T, int RowTiles, int Steps>
struct FragmentsA {
  static constexpr bool kInRegisters = true;
  uint32_t x[RowTiles][Steps][4];

  __device__ __forceinline__ void load(uint32_t (&a)[4], int m, int k) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = x[m][k][i];
  }
  // The first row tile as an operand of wgmma, with the interface of its descriptors (tile/descriptor.cuh).
  __device__ __forceinline__ const uint32_t (&at(int k) const)[4] { return x[0][k]; }

  // Loads all fragments of another operand.
  template <class A>
  __device__ __forceinline__ void read(const A& from) {
#pragma unroll
    for (int m = 0; m < RowTiles; ++m)
#pragma unroll
      for (int k = 0; k < Steps; ++k) from.load(x[m][k], m, k);
  }

  // `slot` as in Accumulator: mma's C layout is its A layout.
  __device__ __forceinline__ void scale_row(int slot, float factor) {
#pragma unroll
    for (int k = 0; k < Steps; ++k) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t& pair = x[slot / 2][k][2 * half + slot % 2];
        if constexpr (sizeof(T) == 2) {
          const float2 y = ptx::unpack<T>(pair);
          pair = ptx::pack<T>(y.x * factor, y.y * factor);
        } else {
          pair = __float_as_uint(__uint_as_float(pair) * factor);
        }
      }
    }
  }
};

// RowsA, except that the first kLeading k steps stay in registers once read() has loaded them.
template <class T, int RowTiles, int kSteps, int kLeading, class Tile>
class LeadingFragmentsA {
 public:
  static constexpr bool kInRegisters = kLeading > 0;
  __device__ __forceinline__ LeadingFragmentsA(uint32_t tile, int row) {
    if constexpr (kLeading < kSteps) rows_ = RowsA<Tile>(tile, row);
  }
  __device__ __forceinline__ void read(uint32_t tile, int row) {
    if constexpr (kLeading > 0) leading_.read(RowsA<Tile>(tile, row));
  }
  __device__ __forceinline__ void load(uint32_t (&a)[4], int m, int k) const {
    if (kLeading > 0 && k < kLeading) {
      leading_.load(a, m, k);
    } else {
      rows_.load(a, m, k);
    }
  }

 private:
  RowsA<Tile> rows_;
  FragmentsA<T, RowTiles, (kLeading > 0 ? kLeading : 1)> leading_;
};

// An accumulator as A, rounded to T: mma's C layout is its A layout.
template <class T, class P>
struct RegistersA {
  static constexpr bool kInRegisters = true;
  const P& p;
  __device__ __forceinline__ void load(uint32_t (&a)[4], int m, int k) const {
    a[0] = ptx::pack<T>(p.x[m][2 * k][0], p.x[m][2 * k][1]);
    a[1] = ptx::pack<T>(p.x[m][2 * k][2], p.x[m][2 * k][3]);
    a[2] = ptx::pack<T>(p.x[m][2 * k + 1][0], p.x[m][2 * k + 1][1]);
    a[3] = ptx::pack<T>(p.x[m][2 * k + 1][2], p.x[m][2 * k + 1][3]);
  }
};

template <class P>
struct RegistersA<float, P> {
  static constexpr bool kInRegisters = true;
  const P& p;
  __device__ __forceinline__ void load(uint32_t (&a)[4], int m, int k) const {
    a[0] = __float_as_uint(p.x[m][k][0]), a[1] = __float_as_uint(p.x[m][k][2]);
    a[2] = __float_as_uint(p.x[m][k][1]), a[3] = __float_as_uint(p.x[m][k][3]);
  }
};

}  // namespace jax_flash
