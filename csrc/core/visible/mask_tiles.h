// Tiles of a boolean mask, of kRowBlock × kRowBlock elements: whether all, none or some of each tile's
// elements are visible. A kernel computes this once per call (cuda/mask_tiles.cu). The lists of
// core/visible/key_tiles.h are made from it, and portable kernels read it themselves. The same kernel packs
// the elements into bits for the forward on sm_90a.
#pragma once

#include "key_tiles.h"
#include "row_blocks.h"

namespace jax_flash {

// The tiles of a call, or none if `seen` is null; at() returns those from one head on. Dimensions that the
// mask broadcasts have one entry and stride 0.
struct MaskTiles {
  static constexpr int32_t block_keys = kRowBlock;

  uint8_t* seen = nullptr;                            // SeenPiece of [leading, batch, head, row, column]
  int64_t leading = 0, batch = 0, head = 0, row = 0;  // strides
  int32_t rows = 0, columns = 0;                      // tiles of a head
  int64_t heads = 0;  // product of the stored leading, batch and head dimensions

  JF_HD MaskTiles at(int64_t leading_entry, int32_t batch_entry, int32_t first_head) const {
    MaskTiles own = *this;
    own.seen += leading_entry * leading + batch_entry * batch + first_head * head;
    return own;
  }
  // How much of `keys` the rows of head h see. Both must lie in tiles of the mask.
  JF_HD SeenPiece seen_of(int32_t h, const Interval& of_rows, const Interval& keys) const {
    return seen_in(tiles_of(of_rows, kRowBlock), tiles_of(keys, kRowBlock),
                   [&](int32_t at, int32_t column) { return seen_of_tile(h, at, column); });
  }
  JF_HD SeenPiece seen_of_tile(int32_t h, int32_t at, int32_t column) const {
    return static_cast<SeenPiece>(seen[h * head + at * row + column]);
  }
};

// The elements of the tiles, in the order in which a warpgroup holds scores: word i of a tile is of thread i,
// with 16 elements of its first row in the low half and of its second row, which is 8 rows later, in the high
// half. A row's bits 2n and 2n + 1 are of keys 8n + 2t and 8n + 2t + 1, where t is the thread's number among
// the four of the row. Dimensions that the mask broadcasts have one entry and stride 0; strides are in tiles.
struct MaskWords {
  static constexpr int32_t kOfTile = kRowBlock * kRowBlock / 32;

  uint32_t* words = nullptr;  // kOfTile of each tile
  int64_t leading = 0, batch = 0, head = 0, row = 0;
  int32_t column = 0;

  JF_HD uint32_t* tile(int64_t leading_entry, int32_t batch_entry, int32_t h, int32_t at,
                       int32_t of_keys) const {
    return words +
           (leading_entry * leading + batch_entry * batch + h * head + at * row + int64_t{of_keys} * column) *
               kOfTile;
  }
};

}  // namespace jax_flash
