// Reads a tile of a bias in shared memory, as a warp's scores have its elements.
#pragma once

#include <cstdint>

#include "core/problem.h"
#include "cuda/ptx/ldmatrix.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/tile/operands.cuh"
#include "cuda/tile/shared_tile.cuh"

namespace jax_flash {

// visit(slot, n, e, address) for every element of scores S, whose rows and keys begin at `row` and `column`
// of the tile, with the address of the element there.
template <class Tile, class S, class Visit>
__device__ __forceinline__ void for_each_address(uint32_t tile, int row, int column, Visit visit) {
  using Element = typename Tile::Element;
  constexpr int kInChunk = kChunk<Element>, kBytes = static_cast<int>(sizeof(Element));
  // Rows that are 8 apart have the same swizzle. A lane's first two rows differ, if it has two.
  constexpr int kOwn = S::kTransposed ? 2 : 1;
  const int first = S::column(0);  // below 8
  LaneAddress<Tile> from[kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; ++i) from[i] = {tile, row + S::row(i), column / kInChunk + first / kInChunk};
#pragma unroll
  for (int slot = 0; slot < S::kSlots; ++slot) {
    const int own = S::kTransposed ? slot % 2 : 0;
#pragma unroll
    for (int n = 0; n < S::kColumnTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int key = S::column_step(n, e);
        const uint32_t chunk = from[own].at(S::row_step(slot) - S::row_step(own), key / kInChunk);
        visit(slot, n, e, chunk + (key % kInChunk + first % kInChunk) * kBytes);
      }
    }
  }
}

// Whether all queries have the same bias. In most kernels its tiles have one row, since copies of it to all
// rows of a tile are as slow as tiles with rows of their own, and by TMA slower.
__host__ __device__ __forceinline__ bool has_one_row(const Problem& p) { return p.bias.row == 0; }

// visit(slot, n, e, bias) for every element of scores S [16, N] in rows, which begin at query `row` and key
// `column` of the tile. `one_row`: the tile has one row, for all queries.
template <class Tile, class S, class Visit>
__device__ __forceinline__ void for_each_bias(uint32_t tile, int row, int column, bool one_row, Visit visit) {
  static_assert(S::kSlots == 2 && !S::kTransposed);
  using Element = typename Tile::Element;
  if constexpr (sizeof(Element) == sizeof(float)) {
    LaneAddress<Tile> from[2];
    for (int slot = 0; slot < 2; ++slot)
      from[slot] = {tile, one_row ? 0 : row + S::row(slot), (column + S::column(0)) / kChunk<float>};
    const int in_chunk = S::column(0) % kChunk<float> * static_cast<int>(sizeof(float));
#pragma unroll
    for (int n = 0; n < S::kColumnTiles; ++n) {
#pragma unroll
      for (int slot = 0; slot < 2; ++slot) {
        const uint32_t at = from[slot].at(0, S::column_step(n) / kChunk<float>);
        const float2 bias = ptx::load_shared_float2(at + in_chunk);
        visit(slot, n, 0, bias.x);
        visit(slot, n, 1, bias.y);
      }
      if (n % 4 == 3) __syncwarp();  // else so many loads come first that registers are spilled
    }
  } else {
    const LaneAddress<Tile> from(tile, one_row ? 0 : row + lane_id() % 16, column / 8 + lane_id() / 16);
#pragma unroll
    for (int n = 0; n < S::kColumnTiles; n += 2) {
      uint32_t pairs[4];
      ptx::ldmatrix_x4(pairs, from.at(0, n));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 bias = ptx::unpack<Element>(pairs[i]);
        visit(i % 2, n + i / 2, 0, bias.x);
        visit(i % 2, n + i / 2, 1, bias.y);
      }
    }
  }
}

// Element `column` of the tile's first row.
template <class Tile>
__device__ __forceinline__ float element_of_row(uint32_t tile, int column) {
  using Element = typename Tile::Element;
  const int chunk = column / kChunk<Element>, in_chunk = column % kChunk<Element>;
  const uint32_t at = tile + Tile::panel_offset(chunk) + chunk % Tile::kPanel * 16;
  if constexpr (sizeof(Element) == sizeof(float)) {
    return ptx::load_shared_float(at + in_chunk * 4);
  } else {
    const float2 pair = ptx::unpack<Element>(ptx::load_shared(at + in_chunk / 2 * 4));
    return in_chunk % 2 == 0 ? pair.x : pair.y;
  }
}

// The same for transposed scores: a warp has 16 keys of all rows.
template <class Tile, class S, class Visit>
__device__ __forceinline__ void for_each_bias_transposed(uint32_t tile, int row, int column, bool one_row,
                                                         Visit visit) {
  static_assert(S::kTransposed && S::kColumnTiles == 1 && S::kSlots % 4 == 0);
  using Element = typename Tile::Element;
  if (one_row) {
    const float biases[] = {element_of_row<Tile>(tile, column + S::column(0)),
                            element_of_row<Tile>(tile, column + S::column(0, 1))};
#pragma unroll
    for (int slot = 0; slot < S::kSlots; ++slot) {
#pragma unroll
      for (int e = 0; e < 2; ++e) visit(slot, 0, e, biases[e]);
    }
  } else if constexpr (sizeof(Element) == sizeof(float)) {
    for_each_address<Tile, S>(tile, row, column, [&](int slot, int n, int e, uint32_t at) {
      visit(slot, n, e, ptx::load_shared_float(at));
    });
  } else {
    const int lane = lane_id();
    const LaneAddress<Tile> from(tile, row + lane / 16 * 8 + lane % 8, column / 8 + lane / 8 % 2);
#pragma unroll
    for (int slot = 0; slot < S::kSlots; slot += 4) {  // two query tiles, each of two blocks of 8 keys
      uint32_t pairs[4];
      ptx::ldmatrix_x4_trans(pairs, from.at(S::row_step(slot), 0));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 bias = ptx::unpack<Element>(pairs[i]);
        visit(slot + i / 2 * 2, 0, i % 2, bias.x);
        visit(slot + i / 2 * 2 + 1, 0, i % 2, bias.y);
      }
    }
  }
}

}  // namespace jax_flash
