// A [Rows, Columns] tile of 16-bit elements in shared memory, swizzled so that neither ldmatrix nor 16-byte
// rows of it meet bank conflicts.
//
// The columns are cut into panels of 64, or of 32 where 64 does not divide them (32, 96, 160, 224); a panel's
// rows lie one after the other, and the 16-byte chunks of a row are permuted by XOR with a number made of the
// row.
#pragma once

#include <cstdint>

namespace jax_flash {

template <int Rows, int Columns>
struct SharedTile {
  static constexpr int kRows = Rows, kColumns = Columns;
  static constexpr int kChunks = Columns / 8;               // of 16 bytes, per row
  static constexpr int kPanel = Columns % 64 == 0 ? 8 : 4;  // chunks per row of a panel
  static constexpr int kPitch = kPanel * 16;                // bytes from row to row
  static constexpr int kBytes = Rows * Columns * 2;
  static_assert(Rows % 8 == 0 && Columns % 32 == 0);

  static constexpr int key(int row) { return kPanel == 8 ? row & 7 : row >> 1 & 3; }
  static constexpr int panel_offset(int chunk) { return chunk / kPanel * Rows * kPitch; }

  // Byte offset of columns [8 · chunk, 8 · chunk + 8) of a row.
  static constexpr int offset(int row, int chunk) {
    return panel_offset(chunk) + row * kPitch + ((chunk % kPanel ^ key(row)) << 4);
  }

  // Whether the eight rows of every 8 × 8 matrix lie in eight different groups of four banks.
  static constexpr bool conflict_free() {
    for (int row = 0; row < Rows; row += 8) {
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        unsigned seen = 0;
        for (int i = 0; i < 8; ++i) seen |= 1u << (offset(row + i, chunk) / 16 % 8);
        if (seen != 0xFFu) return false;
      }
    }
    return true;
  }
};

static_assert(SharedTile<16, 32>::conflict_free() && SharedTile<16, 64>::conflict_free());
static_assert(SharedTile<16, 96>::conflict_free() && SharedTile<16, 160>::conflict_free());
static_assert(SharedTile<16, 192>::conflict_free() && SharedTile<16, 224>::conflict_free());

// The addresses of one lane for ldmatrix: its row and chunk parity are fixed, whole 8-row and 2-chunk steps
// are compile-time constants.
template <class Tile>
struct LaneAddress {
  uint32_t base, swizzle;

  __device__ __forceinline__ LaneAddress(uint32_t tile, int row, int odd_chunk)
      : base(tile + row * Tile::kPitch), swizzle((odd_chunk ^ Tile::key(row)) << 4) {}

  // row % 8 == 0, chunk % 2 == 0.
  __device__ __forceinline__ uint32_t at(int row, int chunk) const {
    return base + (Tile::panel_offset(chunk) + row * Tile::kPitch) + ((chunk % Tile::kPanel << 4) ^ swizzle);
  }
};

}  // namespace jax_flash
