// P and dS of one tile, which every backward kernel recomputes from lse:
//   P = exp(S − lse), dS = P ∘ (dP − delta), delta = rowsum(dO ∘ O).
#pragma once

#include "core/plan/launch_plan.h"
#include "core/problem.h"
#include "cuda/mask.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/score/tile_operands.cuh"
#include "cuda/score/variant.cuh"
#include "cuda/softmax.cuh"
#include "cuda/tile/copy.cuh"
#include "cuda/work.cuh"

namespace jax_flash {

// lse, times log2(e). A row that sees no key has lse = −inf; this returns +inf instead, which makes its P =
// 0.
__device__ __forceinline__ float row_lse(float lse) { return lse == -INFINITY ? INFINITY : lse * kLog2e; }
// True if |lse| is so large that its rounding error changes P.
__device__ __forceinline__ bool lse_too_large(float row_lse) {
  return kLargeShift <= fabsf(row_lse) && fabsf(row_lse) < INFINITY;
}
// x = scale · S − lse, before P = 2^x. An lse of large magnitude is rounded so coarsely that P could be
// infinite. In such a row a score that exceeds lse, or differs from it by less than that rounding, counts as
// equal to it: P = 1.
__device__ __forceinline__ void clamp_for_large_lse(float& x, float row_lse) {
  if (lse_too_large(row_lse) && (x > 0 || fabsf(x) < fabsf(row_lse) / kLargeShift)) x = 0;
}
__device__ __forceinline__ float row_delta(float lse, float delta) { return lse == -INFINITY ? 0 : delta; }

// lse, times log2(e), and delta of a query tile, in shared memory.
template <int M>
struct QueryStatistics {
  float lse[M], delta[M];
};

// lse and delta of a thread's rows, in registers.
template <class S>
struct RowStatistics {
  float lses[S::kSlots], deltas[S::kSlots];

  // lse, delta: at the sequence's first row. `row`: the accumulator's first row within the sequence.
  __device__ __forceinline__ RowStatistics(const Problem& p, const float* lse, const float* delta,
                                           int32_t row, int32_t q_len) {
#pragma unroll
    for (int slot = 0; slot < S::kSlots; ++slot) {
      const int64_t i = row + S::row(slot);
      const float x = i < q_len ? lse[i * p.lse.row] : -INFINITY;
      lses[slot] = row_lse(x);
      deltas[slot] = row_delta(x, x == -INFINITY ? 0 : delta[i * p.delta.row]);
    }
  }
  __device__ __forceinline__ float lse(int slot) const { return lses[slot]; }
  __device__ __forceinline__ float delta(int slot) const { return deltas[slot]; }

  // Zeros S and dP of rows that see no key: their Q and dO may hold NaN or infinities, and 0 · NaN is NaN.
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

// The block state that both backward kernels need: what all threads of a block share, in shared memory.
template <class T>
struct GradientBlock {
  BlockWork work;
  Band band;
  TileOperands score;  // if the score variant reads any
  Interval tiles;      // the tiles to iterate over: queries for a key tile, keys for a query tile
  GlobalRows<const T> key, value, query, dout;  // query and dout of the (first) query head
  const float *lse, *delta;

  template <Over over>
  __device__ void locate(const Problem& p, const GridTiles& grid, int32_t block) {
    work = find_work<over>(p, grid, block);
    band = work.band(p);
    const TileWork& tile = work.tile;
    const int32_t head = work.head, kv_head = p.kv_head(head);
    key = {p.key.as<const T>() + work.offset(p, p.key, kv_head, tile.k_begin), p.key.row, p.head_dim};
    value = {p.value.as<const T>() + work.offset(p, p.value, kv_head, tile.k_begin), p.value.row,
             p.value_dim};
    query = {p.query.as<const T>() + work.offset(p, p.query, head, tile.q_begin), p.query.row, p.head_dim};
    dout = {p.dout.as<const T>() + work.offset(p, p.dout, head, tile.q_begin), p.dout.row, p.value_dim};
    score.prepare_tiles(grid, work);
    lse = p.lse.as<const float>() + work.offset(p, p.lse, head, tile.q_begin);
    delta = p.delta.as<const float>() + work.offset(p, p.delta, head, tile.q_begin);
  }
};

// Whether lse_too_large() for some of a warp's rows: the rows' own flag, or a vote on lse(slot).
template <class S, class Rows>
__device__ __forceinline__ bool some_lse_too_large(const Rows& rows) {
  if constexpr (requires { rows.has_large_lse(); }) {
    return rows.has_large_lse();
  } else {
    bool large_lse = false;
#pragma unroll
    for (int slot = 0; slot < S::kSlots; ++slot) large_lse |= lse_too_large(rows.lse(slot));
    return __any_sync(~0u, large_lse);
  }
}

// S ← scale · S − lse, clamped in rows of a large lse. `rows`: lse(slot).
template <class S, class Rows>
__device__ __forceinline__ void subtract_lse(S& s, const Rows& rows, float scale) {
  const bool large_lse = some_lse_too_large<S>(rows);
  for_each(s, [&](float& x, int slot, int, int) { x = fmaf(x, scale, -rows.lse(slot)); });
  if (__builtin_expect(large_lse, false)) {
    for_each(s, [&](float& x, int slot, int, int) { clamp_for_large_lse(x, rows.lse(slot)); });
  }
}

// S → P = 2^(scale · S − lse).
template <class S, class Rows>
__device__ __forceinline__ void probabilities(S& s, const Rows& rows, float scale) {
  subtract_lse(s, rows, scale);
  for_each(s, [&](float& x, int, int, int) { x = ptx::exp2(x); });
}

// The Wait of tile_gradient() for callers that have dP already.
struct NoWait {
  __device__ __forceinline__ void operator()() const {}
};

// Whether tile_gradient() computes dS without dropout's factor 1 / (1 − rate). The caller then passes rows
// with delta · (1 − rate), and multiplies dQ and dK by dropout_scale().
template <class S, class Score>
inline constexpr bool kOmitsDropoutScale = Score::kDropout && !Score::kScalesGradient && S::kTransposed;

// Computes S → P and dP → dS in place, with the object of a Score variant that has prefetched what it needs.
// P has dropout applied, without its factor 1 / (1 − rate), and is multiplied by Score::kWeightScale.
// `partial`: the band hides some of the tile. wait_dp() is called before dP is read.
template <GradientOf kOf = GradientOf::kProduct, class Score, class Tile, class S, class Rows,
          class Wait = NoWait>
__device__ __forceinline__ void tile_gradient(Score& score, const Tile& tile, const Rows& rows, bool partial,
                                              S& s, S& dp, Wait wait_dp = {}) {
  if constexpr (Score::kFusesGradient) {
    score.fuse_gradient(s, dp, tile, rows, wait_dp);
    if (!partial) return;
    mask_transposed(s, tile.band(), tile.row(), tile.key, 0);
    mask_transposed(dp, tile.band(), tile.row(), tile.key, 0);
    return;
  }
  if constexpr (Score::kScalesGradient) {
    wait_dp();
    score.drop_gradient(dp, tile);  // dP ← dP ∘ mask / (1 − rate)
    for_each(dp, [&](float& x, int slot, int, int) { x -= rows.delta(slot); });  // dP ← dP − delta
  }
  score.template differentiate<kOf>(s, dp, tile);  // S ← score(S); dP ← score'(S) ∘ dP
  if (partial) mask(s, tile.band(), tile.row(), tile.key);
  probabilities(s, rows, Score::power_scale(tile.p.spec));  // P = exp(S − lse)
  if constexpr (kOmitsDropoutScale<S, Score>) {
    wait_dp();
    return score.drop_all(s, dp, rows);
  }
  if constexpr (!Score::kScalesGradient) {
    wait_dp();
    score.drop_gradient(dp, tile);
  }
  for_each(s, [&](float x, int slot, int n, int e) {  // dS = P ∘ (dP − delta)
    float& ds = dp.at(slot, n, e);
    ds = x * (Score::kScalesGradient ? ds : ds - rows.delta(slot));
  });
  if (kOf == GradientOf::kBias && partial)  // P = 0 there, but dP may be infinite, or NaN
    clear_unseen(dp, tile.band(), tile.row(), tile.key);
  score.drop_weights(s, tile);  // P ← drop(P)
}

// The two halves of tile_gradient() for kernels in which one warp has S and another has dP. The first warp
// computes S → P as above, and W = P ∘ score'(S), which is negative where dropout drops the element.
template <class Score, class Tile, class S, class Rows>
__device__ __forceinline__ void tile_weights(Score& score, const Tile& tile, const Rows& rows, bool partial,
                                             S& s, S& w) {
  if constexpr (Score::kScalesGradient) for_each(w, [](float& x, int, int, int) { x = 1; });
  score.template differentiate<GradientOf::kProduct>(s, w, tile);  // S ← score(S); W ← score'(S)
  if (partial) mask(s, tile.band(), tile.row(), tile.key);
  probabilities(s, rows, Score::power_scale(tile.p.spec));  // P = exp(S − lse)
  for_each(s, [&](float x, int slot, int n, int e) {
    float& to = w.at(slot, n, e);
    to = Score::kScalesGradient ? to * x : x;
  });
  score.mark_dropped(w, tile);
  score.drop_weights(s, tile);  // P ← drop(P)
}
// The second warp computes dS = |W| (drop(dP) − delta). `factor`: dropout_scale().
template <class Score>
__device__ __forceinline__ float score_gradient(float w, float dp, float delta, float factor) {
  if constexpr (Score::kDropout) {
    return fabsf(w) * (w < 0 ? -delta : fmaf(dp, factor, -delta));
  } else {
    return w * (dp - delta);
  }
}

}  // namespace jax_flash
