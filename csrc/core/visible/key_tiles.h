// Lists of tiles for block masks and boolean masks: the key tiles that each query tile sees, or the query
// tiles that see each key tile. A kernel makes them once per call (cuda/blocks.cu) for the kernels of score
// kinds Blocks and ListedMask.
#pragma once

#include "blocks.h"

namespace jax_flash {

inline constexpr int32_t kMostPieces = 4;    // pieces per key tile
inline constexpr int32_t kNoKeys = 1 << 30;  // first key of an empty piece: past every sequence

// A listed key tile is a sequence of pieces, each of consecutive keys. An element packs the piece's first
// key, a multiple of 16, with how much of the piece the rows of each consumer warpgroup see. Unused elements
// are 0.
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

// The list of a query tile, in ascending order of keys. Only its last tile may have pieces without keys.
struct KeyList {
  int32_t tiles;
  int32_t last_values;  // valid rows of V in the last tile
};

// The lists of all query tiles of a call. The two consumers of a query tile have neighbouring rows of one
// head, or the same rows of two heads of a KV head.
struct KeyLists {
  KeyPieces* tiles = nullptr;
  KeyList* lists = nullptr;
  int32_t most = 0;         // capacity of a list, in tiles
  int32_t keys = 0;         // keys of a piece
  int32_t rows = 0;         // stride between query tiles
  int32_t heads = 0;        // heads of a query tile
  int32_t query_tiles = 0;  // query tiles of a head
};

// A step of the backward: a query tile of one of the heads, packed with how much of each consumer's keys its
// rows see.
struct ListedStep {
  static constexpr int32_t kMostHeads = 1 << 7, kMostTiles = 1 << 20;

  // Whether the heads of a KV head and the query tiles of `tile` rows fit into the packed fields.
  static bool fit(int64_t heads, int64_t kv_heads, int64_t rows, int64_t tile) {
    return kv_heads > 0 && heads / kv_heads <= kMostHeads && ceil_div(rows, tile) <= kMostTiles;
  }
  JF_HD static int32_t make(int32_t head, int32_t tile, SeenPiece first, SeenPiece second) {
    return head << 24 | KeyPieces::make(tile << 4, first, second);
  }
  JF_HD static int32_t head(int32_t step) { return step >> 24; }
  JF_HD static int32_t tile(int32_t step) { return step >> 4 & (kMostTiles - 1); }
};

// The lists of all key tiles of a call.
struct StepLists {
  int32_t *steps = nullptr, *counts = nullptr;
  int32_t most = 0;          // capacity of a list, in steps
  int32_t* order = nullptr;  // the numbers of the key tiles in the order in which CTAs take them
  int32_t* position = nullptr;  // the query tile that some CTA works on; null: lists begin with the first step
  int32_t query_tiles = 1;
  bool heads_inner = false;
  uint32_t* done = nullptr;  // for each group of heads, counts the parts of key tiles whose dQ has been added
  uint32_t tiles_of_group = 1;
};

}  // namespace jax_flash
