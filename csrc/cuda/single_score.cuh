// Scores with one option beside the scale and the band, each in as few instructions as there are. What they
// leave to the softmax differs: score.cuh does all that a call may ask for, one after the other.
#pragma once

#include <cmath>

#include "cuda/mask.cuh"
#include "cuda/score.cuh"

namespace jax_flash {

// S + of_row ← log2(e) · (scale · S − slope · |distance|).
//
// On one side of the diagonal the distance is a term of the row and one of the column within the tile: the
// row's is left to whoever shifts the row.
template <class S>
__device__ __forceinline__ void add_alibi(S& s, const Problem& p, const ScoreOperands& operands,
                                          const Band& band, int32_t row, int32_t key,
                                          float (&of_row)[S::kSlots]) {
  const float scale = p.spec.scale * kLog2e, slope = operands.slope * kLog2e;
  const int32_t last = 8 * S::kColumnTiles - 1, diagonal = static_cast<int32_t>(band.diagonal(row)) - key;
  const bool before = diagonal >= last, after = diagonal + 8 * S::kSlots <= 0;
#pragma unroll
  for (int slot = 0; slot < S::kSlots; ++slot) of_row[slot] = 0;
  if (before || after) {
    const float signed_slope = before ? slope : -slope;
#pragma unroll
    for (int slot = 0; slot < S::kSlots; ++slot)
      of_row[slot] = -signed_slope * static_cast<float>(diagonal + S::row(slot));
    const float first = signed_slope * static_cast<float>(S::column(0));
    for_each(s, [&](float& x, int, int n, int e) {
      x = fmaf(x, scale, fmaf(signed_slope, static_cast<float>(S::column_step(n) + e), first));
    });
  } else {
#pragma unroll
    for (int slot = 0; slot < S::kSlots; ++slot) {
      const auto distance = static_cast<float>(diagonal + S::row(slot) - S::column(0));
#pragma unroll
      for (int n = 0; n < S::kColumnTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s.at(slot, n, e);
          x = fmaf(-slope, fabsf(distance - static_cast<float>(S::column_step(n) + e)), x * scale);
        }
      }
    }
  }
}

// c tanh(s · scale / c), in powers of two, as a polynomial in s. Its absolute error is that of tanh, times c.
struct Softcap {
  float inner, outer, both;  // scale / c, c · log2(e), their product

  __device__ __forceinline__ explicit Softcap(const AttentionSpec& spec)
      : inner(spec.scale * ptx::reciprocal(spec.softcap)),
        outer(spec.softcap * kLog2e),
        both(spec.scale * kLog2e) {}

  // S [rows from row(), keys from `key`] ← softcap(S) + shift. What a warp's rows see chooses how.
  template <class S, class Row>
  __device__ __forceinline__ void apply(S& s, float shift, const Band& band, Row row, int32_t key) const {
    float top = largest(s);
    bool small = __all_sync(~0u, top <= 0.35f);
    if (!small && !all_seen(s, band, row(), key)) {
      clear_unseen(s, band, row(), key);
      top = largest(s);
      small = __all_sync(~0u, top <= 0.35f);
    }
    if (small) {  // tanh to 5e-7
      polynomial(s, shift, {9.999902052e-1f, -3.326841051e-1f, 1.224803692e-1f});
    } else if (__all_sync(~0u, top <= 1)) {  // to 3e-7
      polynomial(s, shift,
                 {9.999968539e-1f, -3.332400380e-1f, 1.325352526e-1f, -5.097286290e-2f, 1.611418020e-2f,
                  -2.839465134e-3f});
    } else {
      const float twice = 2 * kLog2e * inner, top = outer + shift;  // 1 − 2 / (1 + e^2x), to 3e-7
      for_each(s, [&](float& x, int, int, int) {
        x = fmaf(-2 * outer, ptx::reciprocal(1.0f + ptx::exp2(x * twice)), top);
      });
    }
  }

 private:
  // Of the lane's |s · scale / c|, or NaN. Positive numbers are in the order of their bits, of which one
  // instruction of sm_90 compares three.
  template <class S>
  __device__ __forceinline__ float largest(const S& s) const {
    const auto of_two = [&](int slot, int n) {
      return __float_as_int(fmaxf(fabsf(s.at(slot, n, 0)), fabsf(s.at(slot, n, 1))));
    };
    int top = 0;
#pragma unroll
    for (int slot = 0; slot < S::kSlots; ++slot)
#pragma unroll
      for (int n = 0; n < S::kColumnTiles; n += 2) top = ptx::max3(top, of_two(slot, n), of_two(slot, n + 1));
    return __int_as_float(top) * fabsf(inner);
  }

  template <class S, int kTerms>
  __device__ __forceinline__ void polynomial(S& s, float shift, const float (&of_tanh)[kTerms]) const {
    float c[kTerms], power = both;
#pragma unroll
    for (int i = 0; i < kTerms; ++i) c[i] = of_tanh[i] * power, power *= inner * inner;
    for_each(s, [&](float& x, int, int, int) {
      const float square = x * x;
      float p = c[kTerms - 1];
#pragma unroll
      for (int i = kTerms - 2; i >= 0; --i) p = fmaf(p, square, c[i]);
      x = fmaf(x, p, shift);
    });
  }
};

}  // namespace jax_flash
