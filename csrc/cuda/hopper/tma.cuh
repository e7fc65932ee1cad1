// TMA in the sm_90a kernels: tiles are copied with tensor maps. One thread issues each copy.
#pragma once

#include <cstdint>

#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/tensor_map.h"
#include "cuda/tile/shared_tile.cuh"
#include "cuda/work.cuh"

namespace jax_flash {

// The coordinates of a row of a head in an operand's tensor map (tensor_map.h).
__device__ __forceinline__ ptx::Coordinates coordinates_of(const View& view, const BlockWork& work,
                                                           int32_t head, int32_t row) {
  return {0, head, row, work.batch_row, view.leading[0] ? static_cast<int32_t>(work.leading) : 0};
}

// The same for an operand that heads, batch entries or leading entries may share. An operand has stride 0 and
// size 1 in the dimensions that are shared.
__device__ __forceinline__ ptx::Coordinates shared_coordinates_of(const View& view, const BlockWork& work,
                                                                  int32_t head, int32_t row) {
  ptx::Coordinates at = coordinates_of(view, work, view.head ? head : 0, row);
  if (!view.batch) at.batch = 0;
  return at;
}

// Loads the box of rows at `at` into a Tile, from its row `first` on, by multicast to all CTAs if kCluster
// > 1. `barrier` counts the bytes.
template <class Tile, int kCluster = 1>
__device__ __forceinline__ void load_rows(uint32_t tile, int32_t first, const CUtensorMap& map,
                                          uint32_t barrier, ptx::Coordinates at) {
  constexpr int kInChunk = kChunk<typename Tile::Element>, kColumns = Tile::kPanel * kInChunk;
#pragma unroll
  for (int column = 0; column < Tile::kColumns; column += kColumns, at.column += kColumns) {
    const uint32_t to = tile + Tile::panel_offset(column / kInChunk) + first * Tile::kPitch;
    if constexpr (kCluster == 1) {
      ptx::copy_box(to, map, barrier, at);
    } else {
      ptx::copy_box_to((1 << kCluster) - 1, to, map, barrier, at);
    }
  }
}

}  // namespace jax_flash
