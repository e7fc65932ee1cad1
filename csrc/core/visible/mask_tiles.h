// How much of each tile of kRowBlock × kRowBlock elements a boolean mask shows. A kernel computes this once
// per call (cuda/mask_tiles.cu); the lists of core/visible/key_tiles.h are made from it.
#pragma once

#include "key_tiles.h"
#include "row_blocks.h"

namespace jax_flash {

// The tiles of a call; at() returns those from one head on. Dimensions that the mask broadcasts have one
// entry and stride 0.
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
  // How much of `keys`, which lie in one tile, the rows of head h see. Neither interval is empty.
  JF_HD SeenPiece seen_in_block(int32_t h, const Interval& of_rows, const Interval& keys) const {
    const uint8_t* const first = seen + h * head + keys.lo / kRowBlock;
    bool any = false, all = true;
    for (int32_t at = of_rows.lo / kRowBlock; at <= (of_rows.hi - 1) / kRowBlock; ++at) {
      const auto own = static_cast<SeenPiece>(first[at * row]);
      any |= own != SeenPiece::kNone, all &= own == SeenPiece::kAll;
    }
    return seen_piece_of(any, all);
  }
};

}  // namespace jax_flash
