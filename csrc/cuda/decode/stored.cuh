// A stage's keys and values as they are stored, and as mma's A: Sᵀ = K Qᵀ and Oᵀ += Vᵀ Pᵀ.
//
// float8 is widened between shared memory and the products. ldmatrix moves it in pairs of neighbouring
// features, so that a lane's features are others than those of 16-bit keys; Q and O follow.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/ptx/float8.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/tile/operands.cuh"
#include "cuda/tile/shared_tile.cuh"

namespace jax_flash::decode {

template <class Stored, int kRows, int kColumns>
using StoredTile =
    SharedTile<std::conditional_t<sizeof(Stored) == 1, uint16_t, Stored>, kRows,
               kColumns * sizeof(Stored) / sizeof(std::conditional_t<sizeof(Stored) == 1, uint16_t, Stored>)>;

// K [16 keys, d], as T.
template <class T, class Tile, class Stored = typename Tile::Element>
struct KeysA {
  static constexpr int kAtOnce = 1;  // steps of k that are loaded together
  RowsA<Tile> rows;
  __device__ __forceinline__ explicit KeysA(uint32_t tile) : rows(tile, 0) {}
  __device__ __forceinline__ void load(uint32_t (&a)[1][4], int i) const { rows.load(a[0], 0, i); }

  // Which feature, or the first of two, register `half` of B holds in lane t at step k.
  __device__ __forceinline__ static int feature(int k, int half, int t) {
    return k * kStepK<T> + half * (kStepK<T> / 2) + t * (kStepK<T> / 8);
  }
};

template <class T, class Tile>
struct KeysA<T, Tile, uint8_t> {
  static constexpr int kAtOnce = 2;
  RowsA<Tile> rows;
  __device__ __forceinline__ explicit KeysA(uint32_t tile) : rows(tile, 0) {}
  __device__ __forceinline__ void load(uint32_t (&a)[2][4], int i) const {
    uint32_t x[4];  // four neighbouring features each: keys g and g + 8, then 16 features further
    rows.load(x, 0, i);
#pragma unroll
    for (int step = 0; step < 2; ++step)
#pragma unroll
      for (int r = 0; r < 4; ++r) a[step][r] = ptx::widen_float8<T>(x[2 * step + r % 2] >> r / 2 * 16);
  }
  __device__ __forceinline__ static int feature(int k, int half, int t) { return k * 16 + t * 4 + half * 2; }
};

// Vᵀ [dv, 16 keys], as T.
template <class T, class Tile, class Stored = typename Tile::Element>
struct ValuesA {
  static constexpr int kAtOnce = 1;  // tiles of 16 features that are loaded together
  ColumnsA<Tile, 16> columns;
  __device__ __forceinline__ explicit ValuesA(uint32_t tile) : columns(tile, 0) {}
  __device__ __forceinline__ void load(uint32_t (&a)[1][4], int i, int k) const { columns.load(a[0], i, k); }

  // Which feature of a tile rows g and g + 8 of C are.
  __device__ __forceinline__ static int feature(int g, int half) { return g + 8 * half; }
};

template <class T, class Tile>
struct ValuesA<T, Tile, uint8_t> {
  static constexpr int kAtOnce = 2;
  ColumnsA<Tile, 16> columns;
  __device__ __forceinline__ explicit ValuesA(uint32_t tile) : columns(tile, 0) {}
  __device__ __forceinline__ void load(uint32_t (&a)[2][4], int i, int k) const {
    uint32_t x[4];  // two neighbouring features of two keys each: keys 2t and 2t + 8, of two tiles
    columns.load(x, i, k);
#pragma unroll
    for (int tile = 0; tile < 2; ++tile)
#pragma unroll
      for (int r = 0; r < 4; ++r)
        a[tile][r] = ptx::widen_float8<T>(r % 2 ? ptx::odd_bytes(x[tile + r / 2 * 2])
                                                : ptx::even_bytes(x[tile + r / 2 * 2]));
  }
  __device__ __forceinline__ static int feature(int g, int half) { return 2 * g + half; }
};

}  // namespace jax_flash::decode
