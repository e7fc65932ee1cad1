// A [Rows, Columns] tile of T in shared memory, swizzled so that neither ldmatrix nor 16-byte row accesses
// have bank conflicts.
//
// A chunk is 16 bytes of a row. The columns are cut into panels of 8 chunks (the 128-byte swizzle of TMA and
// wgmma), or of 4 chunks (the 64-byte swizzle) where 8 does not divide them: 16-bit tiles of 32, 80, 96, 160
// or 224 columns. A tile may name another size, down to 2 chunks (the 32-byte swizzle). The last panel may
// have chunks that no column uses. The rows of a panel lie one after the other, and each row XORs its chunk
// numbers with swizzle(row).
//
// A permuted tile passes its rows to mma in another order: of every 32 rows, the n-th 8 × 8 matrix consists
// of rows 2n and 2n + 1 of each group of 8. If these rows are the columns of a product (keys of S), mma's C
// layout then gives each thread 8 adjacent columns of every 32, so that bias and mask are read 16 bytes at a
// time.
#pragma once

#include <cstdint>

namespace jax_flash {

// The row of a permuted tile that mma sees as row `index`.
__host__ __device__ constexpr int permuted(int index) {
  return (index & ~31) + (index & 6) * 4 + (index >> 3 & 3) * 2 + (index & 1);
}

// Elements in a chunk.
template <class T>
inline constexpr int kChunk = 16 / static_cast<int>(sizeof(T));

// The chunks of a row within a panel, unless a tile names another size.
constexpr int panel_of(int chunks) { return chunks % 8 == 0 ? 8 : 4; }

template <class T, int Rows, int Columns, bool Permuted = false, int Panel = panel_of(Columns / kChunk<T>)>
struct SharedTile {
  using Element = T;
  static constexpr int kRows = Rows, kColumns = Columns;
  static constexpr int kChunks = Columns / kChunk<T>;  // per row
  static constexpr int kPanel = Panel;                 // chunks per row within a panel
  static constexpr int kPitch = kPanel * 16;           // bytes from row to row
  static constexpr int kGroup = 8 * kPitch;            // bytes from 8 rows to the next 8
  static constexpr int kPanelBytes = Rows * kPitch;    // from panel to panel
  static constexpr int kBytes = (kChunks + kPanel - 1) / kPanel * kPanelBytes;
  static_assert(Rows % (Permuted ? 32 : 8) == 0 && kChunks % 2 == 0);

  // The tile's row that mma sees as row `index`. row_of(8n + i) = row_of(8n) + row_of(i) for i < 8.
  static constexpr int row_of(int index) { return Permuted ? permuted(index) : index; }

  // The XOR mask of a row's chunk numbers.
  static constexpr int swizzle(int row) {
    if (Permuted) return kPanel == 8 ? (row & 1) | (row >> 3 & 3) << 1 : row >> 3 & 3;
    return kPanel == 8 ? row & 7 : kPanel == 4 ? row >> 1 & 3 : row >> 2 & 1;
  }
  static constexpr int panel_offset(int chunk) { return chunk / kPanel * kPanelBytes; }

  // The byte offset of a chunk.
  static constexpr int offset(int row, int chunk) {
    return panel_offset(chunk) + row * kPitch + ((chunk % kPanel ^ swizzle(row)) << 4);
  }

  // True if the eight rows of every 8 × 8 matrix lie in eight different groups of four banks.
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

// A tile that stores all panels of 8 rows together, before those of the next 8 rows, as one TMA box of
// [rows / 8, panels, 8, 64 columns] writes them.
template <class T, int Rows, int Columns>
struct GroupedTile : SharedTile<T, Rows, Columns> {
  using Base = SharedTile<T, Rows, Columns>;
  using Base::kPanel, Base::kPitch;
  static constexpr int kPanelBytes = 8 * kPitch, kGroup = Columns / 64 * kPanelBytes;
  static_assert(kPanel == 8);

  static constexpr int panel_offset(int chunk) { return chunk / kPanel * kPanelBytes; }
  static constexpr int offset(int row, int chunk) {
    return panel_offset(chunk) + row / 8 * kGroup + row % 8 * kPitch +
           ((chunk % kPanel ^ Base::swizzle(row)) << 4);
  }
};

static_assert(SharedTile<uint16_t, 16, 32>::conflict_free() && SharedTile<uint16_t, 16, 64>::conflict_free());
static_assert(SharedTile<uint16_t, 16, 96>::conflict_free() &&
              SharedTile<uint16_t, 16, 160>::conflict_free());
static_assert(SharedTile<uint16_t, 16, 80>::conflict_free() &&
              SharedTile<uint16_t, 16, 96, false, 2>::conflict_free());
static_assert(SharedTile<uint16_t, 16, 192>::conflict_free() &&
              SharedTile<uint16_t, 16, 224>::conflict_free());
static_assert(SharedTile<uint16_t, 32, 96, true>::conflict_free() &&
              SharedTile<uint16_t, 32, 128, true>::conflict_free());
static_assert(SharedTile<float, 16, 32>::conflict_free() && SharedTile<float, 16, 96>::conflict_free());

// One lane's addresses for ldmatrix. The lane's own row and chunk are folded in once; at() adds steps of 8
// rows and of chunks that are compile-time constants. A step must not carry into the bits of the lane's
// chunk.
template <class Tile>
struct LaneAddress {
  uint32_t base, swizzle;

  LaneAddress() = default;
  __device__ __forceinline__ LaneAddress(uint32_t tile, int row, int chunk)
      : base(tile + row * Tile::kPitch + Tile::panel_offset(chunk)),
        swizzle((chunk % Tile::kPanel ^ Tile::swizzle(row)) << 4) {}

  // row % 8 == 0; for a permuted tile, row_of() of such a number.
  __device__ __forceinline__ uint32_t at(int row, int chunk) const {
    return base + (Tile::panel_offset(chunk) + row * Tile::kPitch) + ((chunk % Tile::kPanel << 4) ^ swizzle);
  }
};

}  // namespace jax_flash
