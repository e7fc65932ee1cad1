// ALiBi: S ← S − slope · |diagonal(i) − j|.
#pragma once

#include <cmath>

#include "core/band.h"
#include "core/score.h"
#include "cuda/score/operands.cuh"
#include "cuda/score/variant.cuh"
#include "cuda/softmax.cuh"
#include "cuda/tile/accumulator.cuh"

namespace jax_flash {

__device__ __forceinline__ float subtract_distance(float x, float slope, float distance) {
  return fmaf(-slope, fabsf(distance), x);
}

// S ← term(S) − slope · |distance|. slope(slot): the slope of the slot's row; distance(slot): the row's
// diagonal minus the lane's first column.
template <class S, class Slope, class Distance, class Term>
__device__ __forceinline__ void subtract_distances(S& s, Slope slope, Distance distance, Term term) {
#pragma unroll
  for (int slot = 0; slot < S::kSlots; ++slot) {
    const float factor = slope(slot), first = distance(slot);
#pragma unroll
    for (int n = 0; n < S::kColumnTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = s.at(slot, n, e);
        x = subtract_distance(term(x), factor, first - static_cast<float>(S::column_step(n, e)));
      }
    }
  }
}

// S ← term(S) − slope · |distance|, for the tile of S whose first row is `row`.
template <class S, class Tile, class Term>
__device__ __forceinline__ void subtract_alibi(S& s, const Tile& tile, int32_t row, float slope, Term term) {
  const auto first = static_cast<float>(tile.band().diagonal(row + S::row(0)) - tile.key - S::column(0));
  subtract_distances(
      s, [slope](int) { return slope; },
      [first](int slot) { return first + static_cast<float>(S::row_step(slot)); }, term);
}

// S + row_term ← log2(e) · (scale · S − slope · |distance|).
//
// In a tile on one side of the diagonal the distance is a term of the row plus a term of the column. The
// row's term is left to the softmax, which shifts the row anyway.
template <class S>
__device__ __forceinline__ void add_alibi(S& s, const Problem& p, const ScoreOperands& operands,
                                          const Band& band, int32_t row, int32_t key,
                                          float (&row_term)[S::kSlots]) {
  const float scale = p.spec.scale * kLog2e, slope = operands.slope * kLog2e;
  const int32_t last = S::kColumns - 1, diagonal = static_cast<int32_t>(band.diagonal(row)) - key;
  const bool before = diagonal >= last, after = diagonal + S::kRows <= 0;
#pragma unroll
  for (int slot = 0; slot < S::kSlots; ++slot) row_term[slot] = 0;
  if (before || after) {
    const float signed_slope = before ? slope : -slope;
#pragma unroll
    for (int slot = 0; slot < S::kSlots; ++slot)
      row_term[slot] = -signed_slope * static_cast<float>(diagonal + S::row(slot));
    const float first = signed_slope * static_cast<float>(S::column(0));
    for_each(s, [&](float& x, int, int n, int e) {
      x = fmaf(x, scale, fmaf(signed_slope, static_cast<float>(S::column_step(n, e)), first));
    });
  } else {
    subtract_distances(
        s, [slope](int) { return slope; },
        [&](int slot) { return static_cast<float>(diagonal + S::row(slot) - S::column(0)); },
        [scale](float x) { return x * scale; });
  }
}

// The score with ALiBi alone.
template <class S>
struct AlibiScore : ScoreVariant<S> {
  static constexpr bool kPositional = true;
  static constexpr bool reads(Operand operand) { return operand == Operand::kAlibiSlopes; }
  template <class T, class M = float>
  using Softmax = OnlineSoftmax<S::kSlots>;
  float row_term[S::kSlots];  // only in the forward
  float slope;                // only in the backward

  __device__ __forceinline__ static float power_scale(const AttentionSpec&) { return 1; }
  template <class Softmax>
  __device__ __forceinline__ static float start(const Problem&) {
    return 1;
  }
  template <class Scores, class Tile, class Softmax>
  __device__ __forceinline__ void apply(Scores& s, const Tile& tile, const Softmax&) {
    add_alibi(s, tile.p, tile.operands(), tile.band(), tile.row(), tile.key, row_term);
  }
  template <bool, class Scores, class Tile, class Softmax>
  __device__ __forceinline__ void exponentiate(Scores& s, const Tile&, Softmax& softmax,
                                               float (&alpha)[S::kSlots], int) {
    softmax.exponentiate(s, alpha, row_term);
  }
  template <class Tile>
  __device__ __forceinline__ void prefetch_gradient(const Tile& tile) {
    slope = tile.operands().slope;
  }
  template <GradientOf kOf, class Tile>
  __device__ __forceinline__ void differentiate(S& s, S&, const Tile& tile) {
    const float scale = tile.p.spec.scale * kLog2e;
    subtract_alibi(s, tile, tile.row(), slope * kLog2e, [scale](float x) { return x * scale; });
  }
};

}  // namespace jax_flash
