// The results of decode: final rows of o and lse or, for a split sequence, partial results. The block that
// finishes the last part of a sequence merges them.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/families/portable_layout.h"
#include "core/plan/launch_plan.h"
#include "core/score.h"
#include "cuda/decode/partition.cuh"
#include "cuda/ptx/atomic.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/row_result.cuh"

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

// Padding rows are written too (o = 0, lse = −inf), except with packed sequences, where the place after a
// sequence's rows belongs to the next sequence.
__device__ __forceinline__ bool is_written(const DecodeCall& call, const ColumnRows& rows,
                                           const SequenceWork& work, int32_t row) {
  return !call.starts || rows.position(row) < work.band.q_len;
}

// `all`: the softmax over all keys, in powers of two. `i`: the row's position.
__device__ __forceinline__ RowResult finish_row(const DecodeCall& call, const SequenceWork& work,
                                                int32_t head, int32_t i, Softmax all) {
  if (i >= work.band.q_len) return {0, -INFINITY};
  const float sink = call.sinks
                         ? *call.sinks.at<const float>(work.leading, work.batch_row, head, work.q_begin + i)
                         : -INFINITY;
  return result_of_row(all.m, all.l, sink);
}

__device__ __forceinline__ void store_lse(const DecodeCall& call, int32_t leading, int32_t batch_row,
                                          int32_t head, int32_t token, float lse) {
  *call.lse.at<float>(leading, batch_row, head, token) = lse;
}

// Writes four adjacent features of o = O / l and, with feature 0, lse. `o` and `all` are sums over all keys.
template <class T>
__device__ __forceinline__ void store_result(const DecodeCall& call, const ColumnRows& rows,
                                             const SequenceWork& work, int32_t row, int32_t feature, float4 o,
                                             Softmax all) {
  const int32_t head = rows.head(row), i = rows.position(row), token = work.q_begin + i;
  const auto [factor, lse] = finish_row(call, work, head, i, all);
  if (factor == 0) o = make_float4(0, 0, 0, 0);
  T* const to = call.out.at<T>(work.leading, work.batch_row, head, token) + feature;
  ptx::store_pair(to, o.x * factor, o.y * factor);
  ptx::store_pair(to + 2, o.z * factor, o.w * factor);
  if (feature == 0) store_lse(call, work.leading, work.batch_row, head, token, lse);
}

// The parts of a split sequence. Fixed splits have a slot for each split. Otherwise a block writes at most
// two parts: the first of its range if that sequence began in an earlier range, and the last if that sequence
// ends in a later one. A split sequence is identified by the range in which it begins.
struct Parts {
  // The number of parts of the sequence, and the index of this part.
  int32_t count, own;
  int32_t first;  // with fixed splits the index of the sequence, otherwise the range of part 0

  template <int kTile>
  __device__ __forceinline__ static Parts of(const DecodeGrid& grid, const Partition& partition,
                                             const WorkIterator<kTile>& segment, int32_t range) {
    if (segment.covers_sequence()) return {1, 0, 0};
    if (grid.fixed_parts()) return {segment.all, segment.unit - segment.base, segment.index};
    const int32_t begin = partition.owner(segment.base);
    return {partition.owner(segment.base + segment.all - 1) - begin + 1, range - begin, begin};
  }
  __device__ __forceinline__ int64_t slot(const DecodeGrid& grid, int32_t part) const {
    if (grid.fixed_parts()) return int64_t{first} * grid.slots + part;
    return 2 * (first + part) + (part == 0 ? 1 : 0);
  }
};

// Partial results in the workspace: O [slots, columns, rows, dv], Softmax [slots, columns, rows], and the
// counters of the sequences that are split (over latent pools, a SplitEntry instead).
template <int kRows>
struct PartialResults {
  float* o;
  Softmax* softmax;
  unsigned long long* counters;
  int32_t columns, width;

  __device__ __forceinline__ explicit PartialResults(const DecodeCall& call)
      : o(reinterpret_cast<float*>(static_cast<char*>(call.workspace) + call.grid.memory)),
        columns(call.columns.value),
        width(call.value_dim) {
    const int64_t rows = call.grid.all_slots * columns * kRows;
    softmax = reinterpret_cast<Softmax*>(o + rows * width);
    counters = reinterpret_cast<unsigned long long*>(softmax + rows);
  }

  __device__ __forceinline__ unsigned long long* counter(const Parts& parts, int32_t column) const {
    return counters + (int64_t{parts.first} * columns + column);
  }
  // The index of a row in `softmax`.
  __device__ __forceinline__ int64_t row(int64_t slot, int32_t column, int32_t row) const {
    return (slot * columns + column) * kRows + row;
  }
};

// The counter of finished parts is in memory that nobody has cleared, so a value without the mark counts
// as 0. The block that finishes last removes the mark.
inline constexpr unsigned long long kCounterMark = 0x9E3779B97F4A0000ull, kCounted = 0xFFFF;

// One thread must call this before its block's count_part().
__device__ __forceinline__ void prepare_counter(unsigned long long* counter) {
  const unsigned long long found = ptx::load_relaxed(counter);
  if ((found & ~kCounted) != kCounterMark) ptx::exchange_if(counter, found, kCounterMark);
}
// One thread must call this after its block has stored all results of its part. Returns whether all `count`
// parts are stored; then the block may read them.
__device__ __forceinline__ bool count_part(unsigned long long* counter, int32_t count) {
  if (ptx::add_released(counter, 1) != kCounterMark + static_cast<unsigned>(count - 1)) return false;
  ptx::acquire();
  *counter = 0;
  return true;
}

}  // namespace jax_flash::decode
