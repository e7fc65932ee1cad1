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

// The slots of a call's parts in the workspace: O [slots, columns, rows, dv], then their Softmax.
template <int kRows>
struct Parts {
  float* o;
  Softmax* softmax;
  int32_t columns, width;

  __device__ __forceinline__ Parts(const Problem& p, const DecodeGrid& grid, void* workspace)
      : o(reinterpret_cast<float*>(static_cast<char*>(workspace) + grid.memory)),
        softmax(reinterpret_cast<Softmax*>(o + grid.all_slots * grid.columns * kRows * p.value_dim)),
        columns(grid.columns),
        width(p.value_dim) {}

  __device__ __forceinline__ int64_t row(int64_t slot, int32_t column, int32_t row) const {
    return (slot * columns + column) * kRows + row;
  }
};

// Four neighbouring features of a row, and where the row stands.
struct RowResult {
  const Problem& p;
  const Rows& rows;
  const Entry& entry;
  int32_t row, feature;

  // o and the softmax of all keys; the sink joins them.
  template <class T>
  __device__ __forceinline__ void store(float4 o, Softmax all) const {
    const int32_t head = rows.head(row), i = rows.position(row);
    const int32_t z = entry.sequence.batch_row, first = entry.sequence.q_begin;
    float factor = 0, lse = -INFINITY;
    if (i < entry.sequence.q_len) {
      finish(all, head, factor, lse);
    } else if (p.packed()) {
      return;  // another sequence's
    }
    if (factor == 0) o = make_float4(0, 0, 0, 0);
    T* out =
        p.out.as<T>() + p.out.leading_offset(p.leading, entry.leading) + p.out.offset(z, head, first + i);
    const uint32_t low = ptx::pack<T>(o.x * factor, o.y * factor),
                   high = ptx::pack<T>(o.z * factor, o.w * factor);
    *reinterpret_cast<uint2*>(out + feature) = make_uint2(low, high);
    if (feature == 0) {
      float* lses = p.lse.as<float>() + p.lse.leading_offset(p.leading, entry.leading);
      lses[p.lse.offset(z, head, first + i)] = lse;
    }
  }

 private:
  __device__ __forceinline__ void finish(Softmax all, int32_t head, float& factor, float& lse) const {
    const View& view = p.sinks;
    const float sink =
        view ? view.as<const float>()[view.leading_offset(p.leading, entry.leading) + head * view.head] *
                   kLog2e
             : -INFINITY;
    const float largest = fmaxf(all.m, sink);
    if (largest == -INFINITY && all.l == 0) return;
    const float alpha = ptx::exp2(all.m - largest);
    const float total = fmaf(all.l, alpha, ptx::exp2(sink - largest));
    factor = alpha / total;
    lse = (largest + log2f(total)) * kLn2;
  }
};

}  // namespace jax_flash::decode
