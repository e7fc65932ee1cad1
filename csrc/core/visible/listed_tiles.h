// The lists of decode: for a sequence and the query rows of a column, the key tiles of which a block mask or
// a boolean mask leaves some key visible. A kernel makes them once per call (cuda/decode_lists.cu).
#pragma once

#include "blocks.h"

namespace jax_flash {

inline constexpr int32_t kPiecesOfTile = 4;  // equal parts of a tile's keys
inline constexpr int32_t kPieceBits = 2;     // of a SeenPiece
inline constexpr int32_t kMostListedTiles = 1 << (32 - kPiecesOfTile * kPieceBits);

// A tile of keys, and how much of each piece of it the rows see.
struct ListedTile {
  int32_t number;
  uint32_t pieces = 0;  // a SeenPiece of each; 0: the rows see all keys

  JF_HD uint32_t packed() const {
    return static_cast<uint32_t>(number) << kPiecesOfTile * kPieceBits | pieces;
  }
  JF_HD static ListedTile of(uint32_t element) {
    constexpr int32_t kBits = kPiecesOfTile * kPieceBits;
    return {static_cast<int32_t>(element >> kBits), element & ((1u << kBits) - 1)};
  }
  // How much the rows see of part i of kParts equal ones.
  template <int kParts>
  JF_HD SeenPiece part(int i) const {
    constexpr int kPieces = kParts < kPiecesOfTile ? kPiecesOfTile / kParts : 1;
    constexpr uint32_t kAll = (1u << kPieces * kPieceBits) - 1, kNone = 0x55 & kAll;
    const uint32_t seen = pieces >> i * kPiecesOfTile / kParts * kPieceBits & kAll;
    return seen == 0 ? SeenPiece::kAll : seen == kNone ? SeenPiece::kNone : SeenPiece::kSome;
  }
  static_assert(static_cast<int>(SeenPiece::kAll) == 0 && static_cast<int>(SeenPiece::kNone) == 1);
};

}  // namespace jax_flash
