// Lists of tiles for block masks and boolean masks: the key tiles that each query tile sees, or the query
// tiles that see each key tile. A kernel makes them once per call (cuda/blocks.cu) for the kernels of score
// kinds Blocks and ListedMask.
#pragma once

#include "blocks.h"
#include "row_blocks.h"

namespace jax_flash {

inline constexpr int32_t kMostPieces = 4;    // pieces per key tile
inline constexpr int32_t kNoKeys = 1 << 30;  // first key of an empty piece: past every sequence

// A listed key tile is a sequence of pieces, each of consecutive keys. An element packs the piece's first
// key, a multiple of 16 for two consumer warpgroups and of 64 for three, with how much of the piece the rows
// of each consumer see. Unused elements are 0.
struct alignas(16) KeyPieces {
  int32_t piece[kMostPieces];

  JF_HD static int32_t make(int32_t key, SeenPiece first, SeenPiece second,
                            SeenPiece third = SeenPiece::kAll) {
    return key | static_cast<int32_t>(first) | static_cast<int32_t>(second) << 2 |
           static_cast<int32_t>(third) << 4;
  }
  template <int kConsumers = 2>
  JF_HD static int32_t key(int32_t piece) {
    return piece & (kConsumers == 2 ? ~15 : ~63);
  }
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

// The lists of all query tiles of a call. All heads of a KV head share `rows` rows, which are parts of
// kRowBlock rows of each head, one head after the other. Each query tile has the next `consumers` parts; the
// last one may have fewer.
struct KeyLists {
  KeyPieces* tiles = nullptr;
  KeyList* lists = nullptr;
  int32_t most = 0;         // capacity of a list, in tiles
  int32_t keys = 0;         // keys of a piece
  int32_t rows = 0;         // stride between the rows of query tiles
  int32_t consumers = 0;    // parts of a query tile
  int32_t group = 0;        // heads of a KV head
  int32_t of_group = 0;     // query tiles of the same rows, of these heads
  int32_t slots = 0;        // of all heads
  int32_t listed = 0;       // slots that have lists: all, or the first if the lists of all heads are the same
  int32_t query_tiles = 0;  // strides of rows

  // Part i of the query tile in a slot of a KV head. Parts past the last head of a KV head do not exist.
  struct Part {
    int32_t head, row;  // among the heads of the KV head, and among the rows
  };
  JF_HD Part part(int32_t slot, int32_t i) const {
    const int32_t number = slot * consumers + i, shift = rows > kRowBlock;  // each head has one or two parts
    return {number >> shift, (number & shift) * kRowBlock};
  }
};

// The query tiles of the same rows for the `group` heads of a KV head.
constexpr JF_HD int32_t slots_of_group(int32_t group, int32_t rows, int32_t consumers) {
  return (group * (rows / kRowBlock) + consumers - 1) / consumers;
}

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
  int32_t* spans = nullptr;  // the length of each list if it had all query tiles, of all heads, from its
                             // first to its last
  int32_t* order = nullptr;  // the numbers of the key tiles in the order in which CTAs take them
};

}  // namespace jax_flash
