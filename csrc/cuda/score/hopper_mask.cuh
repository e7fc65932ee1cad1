// A boolean mask without other options, on sm_90a. Kernels iterate over lists of key tiles
// (core/visible/key_tiles.h) and read elements only in pieces that are partly visible: the forward reads them
// as bits (MaskWords), the backward from the mask (SeenByStep).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "core/visible/key_tiles.h"
#include "core/visible/mask_tiles.h"
#include "cuda/score/lane_bits.cuh"
#include "cuda/score/variant.cuh"

namespace jax_flash {

template <class S>
struct ListedMaskScore : ScoreVariant<S> {
  static constexpr int kPieces = std::max(1, S::kColumns / kRowBlock);  // the backward's S has fewer columns

  bool whole;  // all rows of the consumer see all keys of the tile
  // Which of the thread's elements of each piece are visible, in the order of MaskWords.
  uint32_t seen[kPieces];

  template <bool kScalarDropout, class Tile>
  __device__ __forceinline__ void prefetch(const Tile& tile, int32_t) {
    const KeyPieces& pieces = tile.pieces();
    whole = __all_sync(~0u, pieces.whole(tile.consumer));  // the vote tells the compiler that it is uniform
    if (whole) return;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) seen[i] = seen_of(tile, pieces.piece[i]);
  }
  // S ← −inf outside of the band and the mask.
  template <class Scores, class Tile>
  __device__ __forceinline__ void hide(Scores& s, const Tile&) const {
    if (whole) return;
    constexpr int kOfPiece = kRowBlock / 8;  // column tiles
#pragma unroll
    for (int slot = 0; slot < Scores::kSlots; ++slot) {
#pragma unroll
      for (int n = 0; n < Scores::kColumnTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (!(seen[n / kOfPiece] >> (kBitsOfRow * slot + n % kOfPiece * 2 + e) & 1))
            s.at(slot, n, e) = -INFINITY;
      }
    }
  }

 private:
  static constexpr int kBitsOfRow = 16;

  template <class Tile>
  __device__ __forceinline__ static uint32_t seen_of(const Tile& tile, int32_t piece) {
    const SeenPiece seen = KeyPieces::seen(piece, tile.consumer);
    if (seen != SeenPiece::kSome) return seen == SeenPiece::kAll ? ~0u : 0;
    const int32_t key = KeyPieces::key(piece);
    const uint32_t word = tile.mask_word(key);
    const Interval& in_band = tile.keys_in_band();
    if (in_band.lo <= key && key + kRowBlock <= in_band.hi) return word;
    return word & (shown(tile, S::row(0), key) | shown(tile, S::row(1), key) << kBitsOfRow);
  }
  // The elements of a row that the band shows.
  template <class Tile>
  __device__ __forceinline__ static uint32_t shown(const Tile& tile, int32_t row, int32_t key) {
    const Interval keys = tile.band().row(tile.row() + row);
    return bits_of_columns(columns_from(key + S::column(0), keys)) & ((1u << kBitsOfRow) - 1);
  }
};

}  // namespace jax_flash
