// wgmma's matrix descriptors of a SharedTile, which is aligned to 1024 bytes, where the swizzle's pattern
// repeats.
#pragma once

#include <cstdint>

#include "cuda/tile/shared_tile.cuh"

namespace jax_flash {

// In units of 16 bytes, bits 0–13 hold the address, 16–29 the leading byte offset and 32–45 the stride byte
// offset. Bits 62–63 hold the swizzle: 1 for 128 bytes, 2 for 64 bytes, 3 for 32 bytes.
template <class Tile>
__device__ __forceinline__ uint64_t descriptor(uint32_t address, uint32_t leading) {
  constexpr uint64_t kSwizzle = Tile::kPanel == 8   ? 1
                                : Tile::kPanel == 4 ? 2
                                                    : 3,
                     kStride = Tile::kGroup / 16;
  return uint64_t{(address & 0x3FFFF) >> 4} | uint64_t{leading >> 4} << 16 | kStride << 32 | kSwizzle << 62;
}

// A K-major operand: each row of the tile is a row of A or a column of B.
template <class Tile>
struct RowsDescriptor {
  static constexpr int kSteps = Tile::kChunks / 2;
  uint64_t first;
  __device__ __forceinline__ explicit RowsDescriptor(uint32_t tile) : first(descriptor<Tile>(tile, 16)) {}
  // The descriptor of the k-th 16 elements of the product's K dimension.
  __device__ __forceinline__ uint64_t at(int k) const {
    return first + (Tile::panel_offset(2 * k) + 2 * k % Tile::kPanel * 16) / 16;
  }
};

// An MN-major operand (kTransposeB = 1): each row of the tile is one k.
template <class Tile>
struct ColumnsDescriptor {
  uint64_t first;
  __device__ __forceinline__ explicit ColumnsDescriptor(uint32_t tile)
      : first(descriptor<Tile>(tile, Tile::kPanelBytes)) {}
  __device__ __forceinline__ uint64_t at(int k) const { return first + 2 * k * Tile::kGroup / 16; }
};

}  // namespace jax_flash
