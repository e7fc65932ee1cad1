// What decode writes: final rows of o and lse, or partial results that a second kernel (combine.cuh) merges.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/families/portable_layout.h"
#include "core/plan/launch_plan.h"
#include "core/score.h"
#include "cuda/decode/partition.cuh"
#include "cuda/ptx/math.cuh"

namespace jax_flash::decode {

// The softmax state of one row over some of its keys: m, an upper bound of the scores, and l = Σ 2^(S − m).
// The matching O = Σ 2^(S − m) V is stored separately.
struct Softmax {
  float m, l;
};

// The factor that rescales a partial result to the bound m of the merged one: 2^(m_part − m). A part without
// a visible key has no weight.
__device__ __forceinline__ float merge_weight(const Softmax& part, float m) {
  return part.l == 0 ? 0 : ptx::exp2(part.m - (m == -INFINITY ? 0 : m));
}

// Where one row's result goes.
struct OutputRow {
  int64_t out, lse;  // offsets in elements
  float sink;      // the sink's logit in powers of two; −inf: no sink; +inf: a padding row, which sees no key
  int32_t splits;  // partial results that combine merges; 0: none

  // Padding rows are written too (o = 0, lse = −inf), except with packed sequences, where the place after a
  // sequence's rows belongs to the next sequence.
  __device__ __forceinline__ static bool exists(const Problem& p, const ColumnRows& rows,
                                                const SequenceWork& work, int32_t row) {
    return !p.packed() || rows.position(row) < work.sequence.q_len;
  }
  OutputRow() = default;
  __device__ __forceinline__ OutputRow(const Problem& p, const ColumnRows& rows, const SequenceWork& work,
                                       int32_t row, int32_t split_count)
      : sink(-INFINITY), splits(split_count) {
    const int32_t head = rows.head(row), i = rows.position(row), z = work.sequence.batch_row;
    const int64_t token = int64_t{work.sequence.q_begin} + i, leading = work.leading;
    out = p.out.leading_offset(p.leading, leading) + p.out.offset(z, head, token);
    lse = p.lse.leading_offset(p.leading, leading) + p.lse.offset(z, head, token);
    if (i >= work.sequence.q_len) {
      sink = INFINITY;
    } else if (p.sinks) {
      const int64_t at = p.sinks.leading_offset(p.leading, leading) + head * p.sinks.head;
      sink = p.sinks.as<const float>()[at] * kLog2e;
    }
  }

  // Writes four adjacent features of o = O / l and, with feature 0, lse. o, all: over all keys.
  template <class T>
  __device__ __forceinline__ void store(const Problem& p, int32_t feature, float4 o, Softmax all) const {
    float factor = 0, lse_value = -INFINITY;
    const float largest = fmaxf(all.m, sink);
    // A row whose only scores are NaN has no maximum either, but l is NaN then, and so must be the result.
    if (sink != INFINITY && (largest != -INFINITY || all.l != 0)) {
      const float alpha = ptx::exp2(all.m - largest);
      const float total = fmaf(all.l, alpha, ptx::exp2(sink - largest));
      factor = alpha / total;
      lse_value = (largest + log2f(total)) * kLn2;
    }
    if (factor == 0) o = make_float4(0, 0, 0, 0);
    T* const to = p.out.as<T>() + out + feature;
    ptx::store_pair(to, o.x * factor, o.y * factor);
    ptx::store_pair(to + 2, o.z * factor, o.w * factor);
    if (feature == 0) p.lse.as<float>()[lse] = lse_value;
  }
};
static_assert(sizeof(OutputRow) == kOutputRowBytes);

// Partial results in the workspace: O [slots, columns, rows, dv] and Softmax [slots, columns, rows]. They are
// followed by the OutputRow [columns, rows] of every sequence that may be split: one sequence for each range,
// or all sequences where the call fixes the splits.
template <int kRows>
struct PartialResults {
  float* o;
  Softmax* softmax;
  OutputRow* outputs;
  int32_t columns, width;

  __device__ __forceinline__ PartialResults(const Problem& p, const DecodeGrid& grid, void* workspace)
      : o(reinterpret_cast<float*>(static_cast<char*>(workspace) + grid.memory)),
        columns(grid.columns),
        width(p.value_dim) {
    const int64_t rows = grid.all_slots * columns * kRows;
    softmax = reinterpret_cast<Softmax*>(o + rows * width);
    outputs = reinterpret_cast<OutputRow*>(softmax + rows);
  }

  // The index of a row in `softmax` (index: a slot) or in `outputs` (index: a range or a sequence).
  __device__ __forceinline__ int64_t row(int64_t index, int32_t column, int32_t row) const {
    return (index * columns + column) * kRows + row;
  }
};

// The slot of a partial result. Fixed splits: by the number of the split. Otherwise a block writes at most
// two: for a sequence that began in an earlier range, the first one of its own, and for one that it begins
// and does not end, the last.
__device__ __forceinline__ int64_t partial_slot(const DecodeGrid& grid, int32_t sequence, int32_t unit,
                                                int32_t range) {
  if (grid.fixed_parts()) return int64_t{sequence} * grid.slots + unit;
  return 2 * int64_t{range} + (unit == 0 ? 1 : 0);
}

}  // namespace jax_flash::decode
