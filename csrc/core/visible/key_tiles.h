// The keys that block masks leave to query tiles, as lists of key tiles, and the query tiles that they leave
// to key tiles. A kernel makes them once per call (cuda/blocks.cu) for kernels of score kind Blocks.
#pragma once

#include "blocks.h"

namespace jax_flash {

inline constexpr int32_t kMostPieces = 4;    // of a key tile
inline constexpr int32_t kNoKeys = 1 << 30;  // where the keys of an empty piece begin: past every sequence

// What the rows of a consumer warpgroup see of a piece.
enum class SeenPiece : int32_t { kAll = 0, kNone = 1, kSome = 2 };

// A key tile: pieces of neighbouring keys, which lie in the tile one after the other. A piece is its first
// key, a multiple of 16, and what the rows of both consumers see of it. Unused ones are 0.
struct alignas(16) KeyPieces {
  int32_t piece[kMostPieces];

  JF_HD static int32_t make(int32_t key, SeenPiece first, SeenPiece second) {
    return key | static_cast<int32_t>(first) | static_cast<int32_t>(second) << 2;
  }
  JF_HD static int32_t key(int32_t piece) { return piece & ~15; }
  JF_HD static SeenPiece seen(int32_t piece, int consumer) {
    return static_cast<SeenPiece>(piece >> 2 * consumer & 3);
  }
  // Whether the rows of a consumer see all keys of the tile.
  JF_HD bool whole(int consumer) const {
    return ((piece[0] | piece[1] | piece[2] | piece[3]) >> 2 * consumer & 3) == 0;
  }
};

// The list of a query tile, in ascending order. Only its last tile has pieces without keys.
struct KeyList {
  int32_t tiles;
  int32_t last_values;  // rows of V's last tile that may be multiplied
};

// The lists of all query tiles of a call. A query tile has the rows of two consumers: neighbouring ones of
// one head, or the same ones of two heads of a KV head.
struct KeyLists {
  KeyPieces* tiles = nullptr;
  KeyList* lists = nullptr;
  int32_t most = 0;         // tiles of a list
  int32_t keys = 0;         // of a piece
  int32_t rows = 0;         // from one query tile to the next
  int32_t heads = 0;        // of a query tile
  int32_t query_tiles = 0;  // of a head
};

// The backward's steps of a key tile: query tiles of the heads of its KV head, packed with what the rows see
// of the keys of both consumers.
struct ListedStep {
  static constexpr int32_t kMostHeads = 1 << 7, kMostTiles = 1 << 20;

  JF_HD static int32_t make(int32_t head, int32_t tile, SeenPiece first, SeenPiece second) {
    return head << 24 | KeyPieces::make(tile << 4, first, second);
  }
  JF_HD static int32_t head(int32_t step) { return step >> 24; }
  JF_HD static int32_t tile(int32_t step) { return step >> 4 & (kMostTiles - 1); }
};

// The lists of all key tiles of a call.
struct StepLists {
  int32_t *steps = nullptr, *counts = nullptr;
  int32_t most = 0;  // steps of a list
};

}  // namespace jax_flash
