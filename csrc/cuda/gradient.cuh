// P and dS of one tile, recomputed from lse: what every backward kernel starts from.
#pragma once

#include "core/problem.h"
#include "cuda/mask.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/score.cuh"
#include "cuda/work.cuh"

namespace jax_flash {

// lse and delta of a row as the gradient needs them. Where no key is seen lse = −inf: +inf makes P = 0.
__device__ __forceinline__ float row_lse(float lse) { return lse == -INFINITY ? INFINITY : lse * kLog2e; }
__device__ __forceinline__ float row_delta(float lse, float delta) { return lse == -INFINITY ? 0 : delta; }

// Those of a thread's rows, in registers.
template <class S>
struct RowStatistics {
  float lses[S::kSlots], deltas[S::kSlots];

  // `row`: the accumulator's first row within the sequence.
  __device__ __forceinline__ RowStatistics(const Problem& p, const BlockWork& work, int32_t head,
                                           int32_t row) {
    const float* lse = p.lse.as<const float>() + work.offset(p, p.lse, head, work.tile.q_begin);
    const float* delta = p.delta.as<const float>() + work.offset(p, p.delta, head, work.tile.q_begin);
#pragma unroll
    for (int slot = 0; slot < S::kSlots; ++slot) {
      const int64_t i = row + S::row(slot);
      const float x = i < work.tile.q_len ? lse[i * p.lse.row] : -INFINITY;
      lses[slot] = row_lse(x);
      deltas[slot] = row_delta(x, x == -INFINITY ? 0 : delta[i * p.delta.row]);
    }
  }
  __device__ __forceinline__ float lse(int slot) const { return lses[slot]; }
  __device__ __forceinline__ float delta(int slot) const { return deltas[slot]; }

  // Rows that see nothing give nothing, whatever they and their cotangents hold: 0 · NaN is NaN.
  __device__ __forceinline__ void clear_unseen(S& s, S& dp) const {
#pragma unroll
    for (int slot = 0; slot < S::kSlots; ++slot) {
      if (lses[slot] != INFINITY) continue;
#pragma unroll
      for (int n = 0; n < S::kColumnTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) s.at(slot, n, e) = dp.at(slot, n, e) = 0;
      }
    }
  }
};

// Those of a tile's rows, in shared memory: lse [M] and delta [M].
template <class S, int M>
struct SharedStatistics {
  static constexpr int kBytes = 2 * M * 4;
  const float* first;  // of the accumulator's rows

  __device__ __forceinline__ float lse(int slot) const { return row_lse(first[S::row(slot)]); }
  __device__ __forceinline__ float delta(int slot) const {
    return row_delta(first[S::row(slot)], first[M + S::row(slot)]);
  }

  // Whether this thread's row of the tile sees nothing. Once its own copies have arrived.
  __device__ __forceinline__ static bool unseen(const float* lse) {
    const int i = static_cast<int>(threadIdx.x);
    return i < M && lse[i] == -INFINITY;
  }

  // Starts the copy of rows [row, row + M); those from q_len on are zero, and the band hides them.
  template <int kThreads>
  __device__ __forceinline__ static void load(uint32_t shared, const Problem& p, const BlockWork& work,
                                              int32_t head, int32_t row) {
    static_assert(kThreads >= M);
    const int i = static_cast<int>(threadIdx.x);
    if (i >= M) return;
    const bool used = row + i < work.tile.q_len;
    const int64_t at = work.tile.q_begin + (used ? row + i : 0);
    ptx::cp_async_4(shared + i * 4, p.lse.as<const float>() + work.offset(p, p.lse, head, at), used);
    ptx::cp_async_4(shared + (M + i) * 4, p.delta.as<const float>() + work.offset(p, p.delta, head, at),
                    used);
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
    for_each(dp, [&](float& x, int slot, int, int) { x -= rows.delta(slot); });
    general.apply(s, row, key, kThroughSoftcap ? &dp : nullptr);
  }
  if (partial) mask(s, at.band, row, key);
  const float scale = kGeneral ? 1.0f : p.spec.scale * kLog2e;
  for_each(s, [&](float& x, int slot, int n, int e) {
    float& ds = dp.at(slot, n, e);
    x = ptx::exp2(fmaf(x, scale, -rows.lse(slot)));
    ds = x * (kGeneral ? ds : ds - rows.delta(slot));
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
