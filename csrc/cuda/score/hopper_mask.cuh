// A boolean mask without other options, on sm_90a. Kernels iterate over lists of key tiles
// (core/visible/key_tiles.h) and read the mask only in pieces that are partly visible.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "core/visible/key_tiles.h"
#include "core/visible/row_blocks.h"
#include "cuda/score/mask_bits.cuh"
#include "cuda/score/variant.cuh"

namespace jax_flash {

template <class S>
struct ListedMaskScore : ScoreVariant<S> {
  static constexpr bool reads(Operand operand) { return operand == Operand::kMask; }
  static constexpr int kPieces = std::max(1, S::kColumns / kRowBlock);  // the backward's S has fewer columns

  bool whole;  // all rows of the consumer see all keys of the tile
  // Visibility of 16 keys of each piece as bits, for the lane's first row in the low half and its second row
  // in the high half. The four lanes of a row hold the four quarters of a piece.
  uint32_t seen[kPieces];

  template <bool kScalarDropout, class Tile>
  __device__ __forceinline__ void prefetch(const Tile& tile, int32_t) {
    const KeyPieces& pieces = tile.pieces();
    whole = __all_sync(~0u, pieces.whole(tile.consumer));  // the vote tells the compiler that it is uniform
    if (whole) return;
    const MaskRows mask = tile.mask_rows();
#pragma unroll
    for (int i = 0; i < kPieces; ++i) seen[i] = seen_of(tile, mask, pieces.piece[i]);
  }
  // S ← −inf outside of the band and the mask.
  template <class Scores, class Tile>
  __device__ __forceinline__ void hide(Scores& s, const Tile&) const {
    if (whole) return;
    const int lane = ptx::thread_index() % 32;
#pragma unroll
    for (int part = 0; part < Scores::kColumnTiles / 2; ++part) {
      constexpr int kParts = kRowBlock / MaskRows::kKeys;
      const uint32_t own =
          __shfl_sync(~0u, seen[part / kParts], lane / 4 * 4 + part % kParts) >> lane % 4 * 2;
#pragma unroll
      for (int slot = 0; slot < Scores::kSlots; ++slot) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e)
            if (!(own >> (MaskRows::kKeys * slot + 8 * n + e) & 1)) s.at(slot, 2 * part + n, e) = -INFINITY;
        }
      }
    }
  }

 private:
  template <class Tile>
  __device__ __forceinline__ static uint32_t seen_of(const Tile& tile, const MaskRows& mask, int32_t piece) {
    const SeenPiece seen = KeyPieces::seen(piece, tile.consumer);
    if (seen != SeenPiece::kSome) return seen == SeenPiece::kAll ? ~0u : 0;
    const int32_t key = KeyPieces::key(piece) + ptx::thread_index() % 4 * MaskRows::kKeys;
    return mask.bits_of_two(tile.row() + S::row(0), tile.row() + S::row(1), tile.band(), key);
  }
};

}  // namespace jax_flash
