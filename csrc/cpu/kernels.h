// The work items of the CPU kernels and the table of one instruction set's kernels.
#pragma once

#include <cstdint>

#include "../core/problem.h"
#include "../core/sequence.h"
#include "progress.h"

namespace jax_flash {

// Floats of scratch that any kernel may use; pages that a call does not touch cost nothing.
inline constexpr int64_t kScratchFloats = 3 << 19;

// Tiles of queries that forward takes together.
inline constexpr int32_t kMaxRun = 32;

// Positions [begin, end) of a sequence at one head; with forward, at `heads` query heads of one KV head (of
// several where is_decode), whose rows lie side by side. Rows past the sequence's length are filled.
struct RowTile {
  int64_t leading;
  Sequence sequence;
  int32_t head;  // the first query head
  int32_t begin, end;
  int32_t heads = 1;
  int32_t parts = 1;  // that forward cuts the visible keys into (core/split.h)

  JF_HD int32_t rows() const { return (end - begin) * heads; }
  JF_HD int32_t position(int32_t row) const { return begin + row / heads; }
  JF_HD int32_t head_of(int32_t row) const { return head + row % heads; }
};

// The query heads of a KV head times the new tokens of a sequence: up to this many rows are bound by memory
// and take a path of their own (decode.h).
inline constexpr int32_t kDecodeRows = 16;

JF_HD bool is_decode(const Problem& p, int32_t q_len) {
  return q_len > 0 && p.heads > 0 && int64_t{q_len} * (p.heads / p.kv_heads) <= kDecodeRows;
}

JF_HD bool is_decode(const Problem& p, const RowTile& tile) {
  return tile.begin == 0 && is_decode(p, tile.end);
}

// Tiles of queries that an item of the bias gradient has at most.
inline constexpr int32_t kBiasStrip = 8;

// A tile of the bias gradient, in the bias' own coordinates; an axis that it is broadcast over is summed
// whole.
struct BiasTile {
  int64_t leading;
  int32_t batch, head;  // 0 where broadcast
  int32_t row_begin, row_end;
  int32_t column_begin, column_end;
};

// What the items of the backward share, each of which is a tile of keys at one query head.
struct SharedGradients {
  // The query head, tile by tile: packed by the first item that sees the tile (progress 1), then its dQ, to
  // which the tiles of keys add in order (1 more each).
  float* queries = nullptr;
  Progress query_progress = {};
  // dK and dV of the KV head, tile by tile, to which its query heads add in order; unused where it has but
  // one.
  float* keys = nullptr;
  Progress key_progress = {};
};

struct Kernels {
  const char* isa;
  int32_t tile_m;  // query rows of a tile of forward
  void (*forward)(const Problem&, const RowTile*, int32_t count, float* scratch);  // out, lse of up to
                                                                                   // kMaxRun tiles of a head
  int32_t gradient_m, gradient_n;                // query rows and keys of a tile of the backward
  int64_t (*query_tile_floats)(const Problem&);  // of SharedGradients
  int64_t (*key_tile_floats)(const Problem&);
  void (*backward)(const Problem&, const RowTile&, const SharedGradients&, float* scratch);
  void (*bias_gradient)(const Problem&, const BiasTile&, float* scratch);  // a tile of dbias

  // forward of a tile in parts: each to memory of its own, merged in order into the first, that to out and
  // lse.
  int64_t (*part_floats)(const Problem&, const RowTile&);
  void (*forward_part)(const Problem&, const RowTile&, int32_t part, float* to, float* scratch);
  void (*merge_parts)(const Problem&, const RowTile&, float* first, float* other);
  void (*store_part)(const Problem&, const RowTile&, float* part);

  void (*append)(const AppendProblem&, int64_t leading, int32_t head,
                 int32_t heads);  // the new keys and values of KV heads [head, head + heads)
};

}  // namespace jax_flash
