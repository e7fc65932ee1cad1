// Descriptors: how wgmma finds its operands in a SharedTile, whose swizzle is also the copy engine's. Tiles
// begin at a multiple of 1024 bytes.
#pragma once

#include <cstdint>

#include "cuda/tile/shared_tile.cuh"

namespace jax_flash {

// Bits 0–13 the address, 16–29 and 32–45 the leading and the stride byte offset, all of them / 16; 62–63 the
// swizzle: 1, 128 bytes; 2, 64 bytes.
template <class Tile>
__device__ __forceinline__ uint64_t descriptor(uint32_t address, uint32_t leading) {
  constexpr uint64_t kSwizzle = Tile::kPanel == 8 ? 1 : 2, kStride = 8 * Tile::kPitch / 16;
  return uint64_t{(address & 0x3FFFF) >> 4} | uint64_t{leading >> 4} << 16 | kStride << 32 | kSwizzle << 62;
}

// An operand whose rows in shared memory are rows of A or columns of B: k runs along them.
template <class Tile>
struct RowsDescriptor {
  uint64_t first;
  __device__ __forceinline__ explicit RowsDescriptor(uint32_t tile) : first(descriptor<Tile>(tile, 16)) {}
  // At step k of 16.
  __device__ __forceinline__ uint64_t at(int k) const {
    return first + (Tile::panel_offset(2 * k) + 2 * k % Tile::kPanel * 16) / 16;
  }
};

// One whose rows are those of k (kTransposeB = 1).
template <class Tile>
struct ColumnsDescriptor {
  uint64_t first;
  __device__ __forceinline__ explicit ColumnsDescriptor(uint32_t tile)
      : first(descriptor<Tile>(tile, Tile::kRows * Tile::kPitch)) {}
  __device__ __forceinline__ uint64_t at(int k) const { return first + 16 * k * Tile::kPitch / 16; }
};

}  // namespace jax_flash
