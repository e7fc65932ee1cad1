// P and dS of one tile, recomputed from lse: what every backward kernel starts from.
#pragma once

#include "core/problem.h"
#include "cuda/mask.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/score.cuh"
#include "cuda/work.cuh"

namespace jax_flash {

// lse, as a power of two, and delta of a thread's rows. Rows past q_len, and those that see no key (lse =
// −inf), have lse = +inf, so that P = 0, and delta = 0.
template <int kSlots>
struct RowStatistics {
  float lse[kSlots], delta[kSlots];

  // `row`: the accumulator's first row within the sequence.
  template <class S>
  __device__ __forceinline__ void load(const Problem& p, const BlockWork& work, int32_t head, int32_t row) {
    const float* lses = p.lse.as<const float>() + work.offset(p, p.lse, head, work.tile.q_begin);
    const float* deltas = p.delta.as<const float>() + work.offset(p, p.delta, head, work.tile.q_begin);
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const int64_t i = row + S::row(slot);
      const float x = i < work.tile.q_len ? lses[i * p.lse.row] : -INFINITY;
      lse[slot] = x == -INFINITY ? INFINITY : x * kLog2e;
      delta[slot] = x == -INFINITY ? 0 : deltas[i * p.delta.row];
    }
  }
};

// What does not change from tile to tile of one head.
struct GradientContext {
  const Problem& p;
  const BlockWork& work;
  const Band& band;
  int32_t head;
};

// S, dP → P after dropout but for its factor, dS, in place. `row`, `key`: the accumulators' first within the
// sequence. `partial`: the band hides some of the tile. kThroughSoftcap: dS is the gradient of scale · q·k,
// else that of what softcap returns, which is the bias' as well.
template <bool kGeneral, bool kThroughSoftcap, class S, class Rows>
__device__ __forceinline__ void tile_gradient(const GradientContext& at, const Rows& rows, int32_t row,
                                              int32_t key, bool partial, S& s, S& dp) {
  const Problem& p = at.p;
  KeptElements<S> kept;
  if constexpr (kGeneral) {
    const GeneralScore general(p, at.work, at.band, at.head);
    if (p.dropout) {
      kept = general.template kept<S>(row, key);
      const float factor = dropout_scale(p.spec);
      for_each(dp, [&](float& x, int slot, int n, int e) { x = kept.at(slot, n, e) ? x * factor : 0; });
    }
    for_each(dp, [&](float& x, int slot, int, int) { x -= rows.delta[slot]; });
    general.apply(s, row, key, kThroughSoftcap ? &dp : nullptr);
  }
  if (partial) mask(s, at.band, row, key);
  const float scale = kGeneral ? 1.0f : p.spec.scale * kLog2e;
  for_each(s, [&](float& x, int slot, int n, int e) {
    float& ds = dp.at(slot, n, e);
    x = ptx::exp2(fmaf(x, scale, -rows.lse[slot]));
    ds = x * (kGeneral ? ds : ds - rows.delta[slot]);
  });
  if constexpr (kGeneral) {
    if (p.dropout) {
      for_each(s, [&](float& x, int slot, int n, int e) {
        if (!kept.at(slot, n, e)) x = 0;
      });
    }
  }
}

}  // namespace jax_flash
