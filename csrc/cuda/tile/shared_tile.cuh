// A [Rows, Columns] tile of T in shared memory, swizzled so that neither ldmatrix nor 16-byte rows of it meet
// bank conflicts.
//
// A chunk is 16 bytes of a row. The columns are cut into panels of 8 chunks, or of 4 where 8 does not divide
// them (16-bit: 32, 96, 160, 224 columns); a panel's rows lie one after the other, and the chunks of a row
// are permuted by XOR with a number made of the row.
//
// A dealt tile is read in another order of its rows: of 32 rows, the 8 × 8 matrix n takes 2n and 2n + 1 of
// every 8. Where its rows are the columns of a product, a thread then holds 8 neighbours of each 32.
#pragma once

#include <cstdint>

namespace jax_flash {

__host__ __device__ constexpr int dealt(int index) {
  return (index & ~31) + (index & 6) * 4 + (index >> 3 & 3) * 2 + (index & 1);
}

// Elements of a chunk.
template <class T>
inline constexpr int kChunk = 16 / static_cast<int>(sizeof(T));

template <class T, int Rows, int Columns, bool Dealt = false>
struct SharedTile {
  using Element = T;
  static constexpr int kRows = Rows, kColumns = Columns;
  static constexpr int kChunks = Columns / kChunk<T>;      // per row
  static constexpr int kPanel = kChunks % 8 == 0 ? 8 : 4;  // chunks per row of a panel
  static constexpr int kPitch = kPanel * 16;               // bytes from row to row
  static constexpr int kBytes = Rows * kChunks * 16;
  static_assert(Rows % (Dealt ? 32 : 8) == 0 && kChunks % 4 == 0);

  // The row that is read as number `index`; that of a sum of 8n and a number below 8 is the sum of theirs.
  static constexpr int row_of(int index) { return Dealt ? dealt(index) : index; }

  static constexpr int key(int row) {
    if (Dealt) return kPanel == 8 ? (row & 1) | (row >> 3 & 3) << 1 : row >> 3 & 3;
    return kPanel == 8 ? row & 7 : row >> 1 & 3;
  }
  static constexpr int panel_offset(int chunk) { return chunk / kPanel * Rows * kPitch; }

  // Byte offset of a chunk of a row.
  static constexpr int offset(int row, int chunk) {
    return panel_offset(chunk) + row * kPitch + ((chunk % kPanel ^ key(row)) << 4);
  }

  // Whether the eight rows of every 8 × 8 matrix lie in eight different groups of four banks.
  static constexpr bool conflict_free() {
    for (int row = 0; row < Rows; row += 8) {
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        unsigned seen = 0;
        for (int i = 0; i < 8; ++i) seen |= 1u << (offset(row_of(row + i), chunk) / 16 % 8);
        if (seen != 0xFFu) return false;
      }
    }
    return true;
  }
};

static_assert(SharedTile<uint16_t, 16, 32>::conflict_free() && SharedTile<uint16_t, 16, 64>::conflict_free());
static_assert(SharedTile<uint16_t, 16, 96>::conflict_free() &&
              SharedTile<uint16_t, 16, 160>::conflict_free());
static_assert(SharedTile<uint16_t, 16, 192>::conflict_free() &&
              SharedTile<uint16_t, 16, 224>::conflict_free());
static_assert(SharedTile<uint16_t, 32, 96, true>::conflict_free() &&
              SharedTile<uint16_t, 32, 128, true>::conflict_free());
static_assert(SharedTile<float, 16, 32>::conflict_free() && SharedTile<float, 16, 96>::conflict_free());

// The addresses of one lane for ldmatrix: its row and chunk are fixed, steps of 8 rows and of chunks are
// compile-time constants. A step must not carry into the bits of the lane's chunk.
template <class Tile>
struct LaneAddress {
  uint32_t base, swizzle;

  LaneAddress() = default;
  __device__ __forceinline__ LaneAddress(uint32_t tile, int row, int chunk)
      : base(tile + row * Tile::kPitch + Tile::panel_offset(chunk)),
        swizzle((chunk % Tile::kPanel ^ Tile::key(row)) << 4) {}

  // row % 8 == 0, or, of a dealt tile, row_of such a number.
  __device__ __forceinline__ uint32_t at(int row, int chunk) const {
    return base + (Tile::panel_offset(chunk) + row * Tile::kPitch) + ((chunk % Tile::kPanel << 4) ^ swizzle);
  }
};

}  // namespace jax_flash
