// Block masks alone on sm_90a. Kernels go through lists of key tiles (core/visible/key_tiles.h), and mask
// only tiles in which some row does not see all keys.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/visible/key_tiles.h"
#include "cuda/score/blocks.cuh"
#include "cuda/score/variant.cuh"

namespace jax_flash {

template <class S>
struct BlocksScore : ScoreVariant<S> {
  static constexpr bool reads(Operand operand) { return operand == Operand::kBlockMask; }

  bool whole;  // all rows of the consumer see all keys of the tile

  template <bool kScalarDropout, class Tile>
  __device__ __forceinline__ void prefetch(const Tile& tile, int32_t) {
    // The vote tells the compiler that it is uniform.
    whole = __all_sync(~0u, tile.pieces().whole(tile.consumer));
  }
  // S ← −inf outside of the band and the blocks.
  template <class Scores, class Tile>
  __device__ __forceinline__ void hide(Scores& s, const Tile& tile) const {
    if (!whole) hide_pieces(s, tile, tile.pieces(), tile.keys_of_piece());
  }

 private:
  // The loop over the tile's pieces of `keys` keys is not unrolled, which takes the fewest registers. With
  // three consumers the rows of each lie in one block, so only the band hides a part of a piece.
  template <class Scores, class Tile>
  __device__ __forceinline__ static void hide_pieces(Scores& s, const Tile& tile, const KeyPieces& pieces,
                                                     int32_t keys) {
    const BlockMask blocks = tile.block_mask();
#pragma unroll 1
    for (int32_t at = 0, column = 0; column < Scores::kColumns; ++at, column += keys) {
      const int32_t piece = pieces.piece[at], key = KeyPieces::key<Tile::kConsumers>(piece);
      const SeenPiece seen = KeyPieces::seen(piece, tile.consumer);
      if (seen == SeenPiece::kAll) continue;
      const int32_t first = column - Scores::column(0);
#pragma unroll
      for (int slot = 0; slot < Scores::kSlots; ++slot) {
        const int32_t row = tile.row() + Scores::row(slot);
        Interval own{0, 0};
        if (seen == SeenPiece::kSome && (Tile::kConsumers > 2 || blocks.sees(0, row, key)))
          own = tile.band().row(row);
        own = intersect(own, {key, key + keys});
        if (own.empty()) own = {key + keys, key + keys};
        hide_columns(s, slot, {first, first + own.lo - key});
        hide_columns(s, slot, {first + own.hi - key, first + keys});
      }
    }
  }
  template <class Scores>
  __device__ __forceinline__ static void hide_columns(Scores& s, int slot, const Interval& columns) {
    if (columns.empty()) return;
#pragma unroll
    for (int n = 0; n < Scores::kColumnTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (columns.contains(Scores::column_step(n, e))) s.at(slot, n, e) = -INFINITY;
    }
  }
};

}  // namespace jax_flash
