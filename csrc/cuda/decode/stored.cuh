// A stage's keys and values in their stored dtype, and their fragments as mma's A for Sᵀ = K Qᵀ and Oᵀ += Vᵀ
// Pᵀ.
//
// float8 is widened after ldmatrix, which moves it in 16-bit pairs of adjacent features. Hence a lane holds
// other features than with 16-bit keys, and the fragments of Q and O follow that order. The float8 format is
// a template argument of the loads, because a branch in each load would keep the compiler from grouping them.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/spec.h"
#include "cuda/ptx/float8.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/tile/operands.cuh"
#include "cuda/tile/shared_tile.cuh"

namespace jax_flash::decode {

// float8 is stored as 16-bit pairs.
template <class Stored, int kRows, int kColumns>
using StoredTile =
    SharedTile<std::conditional_t<sizeof(Stored) == 1, uint16_t, Stored>, kRows,
               kColumns * sizeof(Stored) / sizeof(std::conditional_t<sizeof(Stored) == 1, uint16_t, Stored>)>;

// K [keys, d], converted to T.
template <class T, class Tile, class Stored = typename Tile::Element>
struct KeysA {
  static constexpr int kAtOnce = 1;  // k steps per load
  RowsA<Tile> rows;
  __device__ __forceinline__ explicit KeysA(uint32_t tile) : rows(tile, 0) {}
  // The fragments of the m-th 16 keys.
  template <DType>
  __device__ __forceinline__ void load(uint32_t (&a)[1][4], int m, int i) const {
    rows.load(a[0], m, i);
  }

  // The feature, or the first of two, that register `half` of B (Q) must hold in lane t at k step k.
  __device__ __forceinline__ static int feature(int k, int half, int t) {
    return k * kStepK<T> + half * (kStepK<T> / 2) + t * (kStepK<T> / 8);
  }
};

template <class T, class Tile>
struct KeysA<T, Tile, uint8_t> {
  static constexpr int kAtOnce = 2;
  RowsA<Tile> rows;
  __device__ __forceinline__ explicit KeysA(uint32_t tile) : rows(tile, 0) {}
  template <DType kFormat>
  __device__ __forceinline__ void load(uint32_t (&a)[2][4], int m, int i) const {
    // Four adjacent features in each: of key g, of key g + 8, and of both keys 16 features further on.
    uint32_t x[4];
    rows.load(x, m, i);
#pragma unroll
    for (int step = 0; step < 2; ++step)
#pragma unroll
      for (int r = 0; r < 4; ++r)
        a[step][r] = ptx::widen_float8<T, kFormat>(x[2 * step + r % 2] >> r / 2 * 16);
  }
  __device__ __forceinline__ static int feature(int k, int half, int t) { return k * 16 + t * 4 + half * 2; }
};

// Vᵀ [dv, keys], converted to T.
template <class T, class Tile, class Stored = typename Tile::Element>
struct ValuesA {
  static constexpr int kAtOnce = 1;  // tiles of 16 features per load
  ColumnsA<Tile, 16> columns;
  __device__ __forceinline__ explicit ValuesA(uint32_t tile) : columns(tile, 0) {}
  template <DType>
  __device__ __forceinline__ void load(uint32_t (&a)[1][4], int i, int k) const {
    columns.load(a[0], i, k);
  }

  // The feature in a tile that row g (half 0) or g + 8 (half 1) of C (Oᵀ) holds.
  __device__ __forceinline__ static int feature(int g, int half) { return g + 8 * half; }
};

template <class T, class Tile>
struct ValuesA<T, Tile, uint8_t> {
  static constexpr int kAtOnce = 2;
  ColumnsA<Tile, 16> columns;
  __device__ __forceinline__ explicit ValuesA(uint32_t tile) : columns(tile, 0) {}
  template <DType kFormat>
  __device__ __forceinline__ void load(uint32_t (&a)[2][4], int i, int k) const {
    uint32_t x[4];  // two adjacent features of two keys each: from keys 2t and 2t + 8, in two feature tiles
    columns.load(x, i, k);
#pragma unroll
    for (int tile = 0; tile < 2; ++tile)
#pragma unroll
      for (int r = 0; r < 4; ++r)
        a[tile][r] = ptx::widen_float8<T, kFormat>(r % 2 ? ptx::odd_bytes(x[tile + r / 2 * 2])
                                                         : ptx::even_bytes(x[tile + r / 2 * 2]));
  }
  __device__ __forceinline__ static int feature(int g, int half) { return 2 * g + half; }
};

}  // namespace jax_flash::decode
