// What decode leaves: results, or the parts of a sequence that a second kernel joins.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/plan.h"
#include "core/score.h"
#include "cuda/decode/schedule.cuh"
#include "cuda/ptx/math.cuh"

namespace jax_flash::decode {

// The softmax of one row over some keys: m a bound on the scores, l = Σ 2^(S − m); o = Σ 2^(S − m) V lies
// beside it.
struct Softmax {
  float m, l;
};

// How the softmax of a part enters a union whose bound is m. Without a visible key nothing does.
__device__ __forceinline__ float weight(const Softmax& part, float m) {
  return part.l == 0 ? 0 : ptx::exp2(part.m - (m == -INFINITY ? 0 : m));
}

// Where a row's result goes, as offsets in elements, and what joins its softmax.
struct Target {
  int64_t out, lse;
  float sink;     // in powers of two, −inf: none, +inf: the row lies past the queries and sees nothing
  int32_t parts;  // that are to be joined, 0: none

  // Rows past the queries have a place too, but for those of packed sequences, where it is another's.
  __device__ __forceinline__ static bool exists(const Problem& p, const Rows& rows, const Entry& entry,
                                                int32_t row) {
    return !p.packed() || rows.position(row) < entry.sequence.q_len;
  }
  Target() = default;
  __device__ __forceinline__ Target(const Problem& p, const Rows& rows, const Entry& entry, int32_t row,
                                    int32_t part_count)
      : sink(-INFINITY), parts(part_count) {
    const int32_t head = rows.head(row), i = rows.position(row), z = entry.sequence.batch_row;
    const int64_t token = int64_t{entry.sequence.q_begin} + i, leading = entry.leading;
    out = p.out.leading_offset(p.leading, leading) + p.out.offset(z, head, token);
    lse = p.lse.leading_offset(p.leading, leading) + p.lse.offset(z, head, token);
    if (i >= entry.sequence.q_len) {
      sink = INFINITY;
    } else if (p.sinks) {
      const int64_t at = p.sinks.leading_offset(p.leading, leading) + head * p.sinks.head;
      sink = p.sinks.as<const float>()[at] * kLog2e;
    }
  }

  // o and the softmax of all keys, for four neighbouring features.
  template <class T>
  __device__ __forceinline__ void store(const Problem& p, int32_t feature, float4 o, Softmax all) const {
    float factor = 0, statistic = -INFINITY;
    const float largest = fmaxf(all.m, sink);
    // A NaN alone has no maximum.
    if (sink != INFINITY && (largest != -INFINITY || all.l != 0)) {
      const float alpha = ptx::exp2(all.m - largest);
      const float total = fmaf(all.l, alpha, ptx::exp2(sink - largest));
      factor = alpha / total;
      statistic = (largest + log2f(total)) * kLn2;
    }
    if (factor == 0) o = make_float4(0, 0, 0, 0);
    T* const to = p.out.as<T>() + out + feature;
    ptx::store_pair(to, o.x * factor, o.y * factor);
    ptx::store_pair(to + 2, o.z * factor, o.w * factor);
    if (feature == 0) p.lse.as<float>()[lse] = statistic;
  }
};
static_assert(sizeof(Target) == kDecodeTargetBytes);

// What parts leave in the workspace: O [slots, columns, rows, dv] and its Softmax [slots, columns, rows]; and
// for every sequence that may have been cut (one for each range, or all where parts are given) its Target
// [columns, rows].
template <int kRows>
struct Parts {
  float* o;
  Softmax* softmax;
  Target* targets;
  int32_t columns, width;

  __device__ __forceinline__ Parts(const Problem& p, const DecodeGrid& grid, void* workspace)
      : o(reinterpret_cast<float*>(static_cast<char*>(workspace) + grid.memory)),
        columns(grid.columns),
        width(p.value_dim) {
    const int64_t rows = grid.all_slots * columns * kRows;
    softmax = reinterpret_cast<Softmax*>(o + rows * width);
    targets = reinterpret_cast<Target*>(softmax + rows);
  }

  // Of a slot, or of a sequence.
  __device__ __forceinline__ int64_t row(int64_t index, int32_t column, int32_t row) const {
    return (index * columns + column) * kRows + row;
  }
};

// Where a part goes. Given parts: by their number. Else a block leaves two at most: a sequence that it does
// not begin, which then is the first of its range, and one that it begins and does not end, the last.
__device__ __forceinline__ int64_t slot_of(const DecodeGrid& grid, int32_t entry, int32_t unit,
                                           int32_t range) {
  if (grid.fixed_parts()) return int64_t{entry} * grid.slots + unit;
  return 2 * int64_t{range} + (unit == 0 ? 1 : 0);
}

}  // namespace jax_flash::decode
