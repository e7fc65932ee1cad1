// The work items of the CPU passes, and the function table that each instruction set provides.
#pragma once

#include <cstdint>

#include "../core/problem.h"
#include "../core/sequence.h"
#include "progress.h"

namespace jax_flash {

// Floats of scratch that a kernel may use. Pages that a call does not touch are never faulted in and cost
// nothing.
inline constexpr int64_t kScratchFloats = 3 << 20;

// The most query tiles of one call of Kernels::forward.
inline constexpr int32_t kMaxQueryTiles = 32;

// Positions [begin, end) of a sequence at `heads` query heads from `head` on, with the heads of a position
// adjacent. In forward and tangent the heads share a KV head (in decode they may belong to several); a tile
// of keys of the backward has one head. Rows past the sequence's length have defined results too, which the
// kernel writes.
struct RowTile {
  int64_t leading;
  Sequence sequence;
  int32_t head;  // the first query head
  int32_t begin, end;
  int32_t heads = 1;
  int32_t parts = 1;  // parts into which forward splits the visible keys (core/split.h)

  JF_HD int32_t rows() const { return (end - begin) * heads; }
  JF_HD int32_t position(int32_t row) const { return begin + row / heads; }
  JF_HD int32_t head_of(int32_t row) const { return head + row % heads; }
};

// Up to this many query rows per KV head (group size times new tokens of the sequence), attention is bound
// by memory bandwidth and runs in decode.h.
inline constexpr int32_t kDecodeRows = 16;

JF_HD bool is_decode(const Problem& p, int32_t q_len) {
  return q_len > 0 && p.heads > 0 && int64_t{q_len} * (p.heads / p.kv_heads) <= kDecodeRows;
}

JF_HD bool is_decode(const Problem& p, const RowTile& tile) {
  return tile.begin == 0 && is_decode(p, tile.end);
}

// The most query tiles of a work item of the bias gradient.
inline constexpr int32_t kBiasStrip = 8;

// A tile of dbias, in coordinates of the bias. An axis along which the bias is broadcast is summed in full.
struct BiasTile {
  int64_t leading;
  int32_t batch, head;  // 0 if the bias is broadcast along the axis
  int32_t row_begin, row_end;
  int32_t column_begin, column_end;
};

// The memory that work items of the backward share. Each item is a tile of keys at one query head.
struct SharedGradients {
  // The query head's tiles: Q and dO, which the first item that sees the tile packs (progress 1), then dQ, to
  // which the tiles of keys add in order (progress + 1 each).
  float* queries = nullptr;
  Progress query_progress = {};
  // The KV head's tiles of dK and dV, to which its query heads add in order; unused without GQA.
  float* keys = nullptr;
  Progress key_progress = {};
};

struct Kernels {
  const char* isa;
  int32_t tile_m;  // query rows of a forward tile
  // out and lse of up to kMaxQueryTiles tiles of one head.
  void (*forward)(const Problem&, const RowTile*, int32_t count, float* scratch);
  int32_t gradient_m, gradient_n;                // query rows and keys of a tile of the backward
  int64_t (*query_tile_floats)(const Problem&);  // floats of a tile of SharedGradients
  int64_t (*key_tile_floats)(const Problem&);
  void (*backward)(const Problem&, const RowTile&, const SharedGradients&, float* scratch);
  void (*bias_gradient)(const Problem&, const BiasTile&, float* scratch);  // one tile of dbias
  // tout and tlse of up to tangent_tiles(problem) tiles of one head.
  int32_t (*tangent_tiles)(const Problem&);
  void (*tangent)(const Problem&, const Tangents&, const RowTile*, int32_t count, float* scratch);

  // Forward of a tile whose keys are split: forward_part computes each partial output, merge_parts merges
  // them in order into the first, and store_part writes out and lse from that.
  int64_t (*part_floats)(const Problem&, const RowTile&);
  void (*forward_part)(const Problem&, const RowTile&, int32_t part, float* to, float* scratch);
  void (*merge_parts)(const Problem&, const RowTile&, float* first, float* other);
  void (*store_part)(const Problem&, const RowTile&, float* part);

  // Appends the new keys and values of KV heads [head, head + heads).
  void (*append)(const AppendProblem&, int64_t leading, int32_t head, int32_t heads);
};

}  // namespace jax_flash
