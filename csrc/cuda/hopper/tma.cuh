// TMA in the sm_90a kernels. Tiles of 16-bit elements are copied with tensor maps; float32 vectors are copied
// and added by bulk copies without a map. One thread issues each copy.
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

// Loads the box of rows at `at` into a Tile, from its row `first` on, by multicast to all CTAs if kCluster
// > 1. `barrier` counts the bytes.
template <class Tile, int kCluster = 1>
__device__ __forceinline__ void load_rows(uint32_t tile, int32_t first, const CUtensorMap& map,
                                          uint32_t barrier, ptx::Coordinates at) {
  constexpr int kColumns = Tile::kPanel * 8;
#pragma unroll
  for (int column = 0; column < Tile::kColumns; column += kColumns, at.column += kColumns) {
    const uint32_t to = tile + Tile::panel_offset(column / 8) + first * Tile::kPitch;
    if constexpr (kCluster == 1) {
      ptx::copy_box(to, map, barrier, at);
    } else {
      ptx::copy_box_to((1 << kCluster) - 1, to, map, barrier, at);
    }
  }
}

// Whether load_statistics can load lse or delta: their addresses have to be multiples of 16 bytes. The first
// row of a load and the number of rows are multiples of 4.
__host__ __device__ inline bool loads_statistics(const View& view, int32_t first_row) {
  const auto multiple_of_4 = [](int64_t x) { return x % 4 == 0; };
  return view.row == 1 && multiple_of_4(view.head) && multiple_of_4(view.batch) &&
         multiple_of_4(view.leading[0]) && multiple_of_4(first_row) &&
         reinterpret_cast<uintptr_t>(view.data) % 16 == 0;
}

// Loads `count` float32, a multiple of 4, between addresses that are multiples of 16 bytes. Unlike a box, it
// does not stop at the tensor's end, so the caller limits `count`.
__device__ __forceinline__ void load_statistics(uint32_t shared, const float* from, int32_t count,
                                                uint32_t barrier) {
  ptx::copy_bytes(shared, from, count * sizeof(float), barrier);
}

// to[0, count) += the float32 in shared memory, under the same conditions on count and addresses as
// load_statistics. The threads that wrote shared memory first run ptx::fence_async_shared(). Afterwards the
// issuing thread runs ptx::bulk_commit(), then ptx::bulk_wait_read() before the shared memory is overwritten,
// and ptx::bulk_wait() before it signals that the sums are complete.
__device__ __forceinline__ void add_floats(float* to, uint32_t shared, int32_t count) {
  ptx::reduce_add_floats(to, shared, count * sizeof(float));
}

}  // namespace jax_flash
