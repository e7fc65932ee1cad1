// The work items of the CPU kernels and the table of one instruction set's kernels.
#pragma once

#include <cstdint>

#include "../core/problem.h"
#include "../core/sequence.h"

namespace jax_flash {

inline constexpr int32_t kMaxHeadDim = 256;

// Floats of scratch that any kernel may use; pages that a call does not touch cost nothing.
inline constexpr int64_t kScratchFloats = 1 << 20;

// Rows [begin, end) of a sequence at one head. Rows past the sequence's length are filled.
struct RowTile {
  int64_t leading;
  Sequence sequence;
  int32_t head;  // a query head, or a KV head for tiles of keys
  int32_t begin, end;
};

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
  int32_t tile_m, tile_n;                                                  // query rows and keys of a tile
  void (*forward)(const Problem&, const RowTile&, float* scratch);         // out, lse of a tile of queries
  void (*backward_query)(const Problem&, const RowTile&, float* scratch);  // dquery of a tile of queries
  void (*backward_key)(const Problem&, const RowTile&, float* scratch);    // dkey, dvalue of a tile of keys
  void (*bias_gradient)(const Problem&, const BiasTile&, float* scratch);  // a tile of dbias
};

}  // namespace jax_flash
