// The work items of the CPU kernels and the table of one instruction set's kernels.
#pragma once

#include <cstdint>

#include "../core/problem.h"
#include "../core/sequence.h"

namespace jax_flash {

inline constexpr int32_t kMaxHeadDim = 256;

// Floats of scratch that any kernel may use; pages that a call does not touch cost nothing.
inline constexpr int64_t kScratchFloats = 1 << 20;

// Tiles of queries that forward takes together.
inline constexpr int32_t kMaxRun = 8;

// Positions [begin, end) of a sequence at one head; with forward, at `heads` query heads of one KV head (of
// several where is_decode), whose rows lie side by side. Rows past the sequence's length are filled.
struct RowTile {
  int64_t leading;
  Sequence sequence;
  int32_t head;  // the first query head, or the KV head of tiles of keys
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

// A tile of the bias gradient, in the bias' own coordinates; an axis that it is broadcast over is summed
// whole.
struct BiasTile {
  int64_t leading;
  int32_t batch, head;  // 0 where broadcast
  int32_t row_begin, row_end;
  int32_t column_begin, column_end;
};

struct Kernels {
  const char* isa;
  int32_t tile_m, tile_n;  // query rows and keys of a tile
  void (*forward)(const Problem&, const RowTile*, int32_t count, float* scratch);  // out, lse of up to
                                                                                   // kMaxRun tiles of a head
  void (*backward_query)(const Problem&, const RowTile&, float* scratch);  // dquery of a tile of queries
  void (*backward_key)(const Problem&, const RowTile&, float* scratch);    // dkey, dvalue of a tile of keys
  void (*bias_gradient)(const Problem&, const BiasTile&, float* scratch);  // a tile of dbias

  // forward of a tile in parts: each to memory of its own, merged in order into the first, that to out and
  // lse.
  int64_t (*part_floats)(const Problem&, const RowTile&);
  void (*forward_part)(const Problem&, const RowTile&, int32_t part, float* to, float* scratch);
  void (*merge_parts)(const Problem&, const RowTile&, float* first, float* other);
  void (*store_part)(const Problem&, const RowTile&, float* part);

  void (*append)(const AppendProblem&, int64_t leading,
                 int32_t head);  // the new keys and values of a KV head
};

}  // namespace jax_flash
