// Softcap: S ← c · tanh(scale · S / c), and the approximations of tanh that it uses.
#pragma once

#include <cmath>
#include <type_traits>

#include "core/problem.h"
#include "core/score.h"
#include "core/spec.h"
#include "cuda/mask.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/score/variant.cuh"
#include "cuda/softmax.cuh"
#include "cuda/tile/accumulator.cuh"

namespace jax_flash {

// tanh with an absolute error of 3e-7: 1 − 2 / (1 + e^2x).
__device__ __forceinline__ float tanh_absolute(float x) {
  return fmaf(-2.0f, ptx::reciprocal(1.0f + ptx::exp2(x * (2 * kLog2e))), 1.0f);
}

// tanh with a relative error of 5e-7. Near zero, where the difference above cancels, it is x (1 + x² p(x²)).
__device__ __forceinline__ float tanh_relative(float x) {
  const float square = x * x;
  float p = fmaf(1.728459201e-2f, square, -5.313979271e-2f);
  p = fmaf(fmaf(p, square, 1.332833481e-1f), square, -3.333328104e-1f);
  return fabsf(x) < 0.55f ? fmaf(x * square, p, x) : tanh_absolute(x);
}

// tanh with an absolute error of 3e-7 for |x| ≤ 1: x (1 + x² p(x²)), by FMAs alone, because softmax keeps the
// MUFU busy.
__device__ __forceinline__ float tanh_polynomial(float x) {
  const float square = x * x;
  float p = fmaf(-2.983081620e-3f, square, 1.653281599e-2f);
  p = fmaf(fmaf(p, square, -5.142535269e-2f), square, 1.327561587e-1f);
  return fmaf(x * square, fmaf(p, square, -3.332867026e-1f), x);
}

// c · tanh(x / c), for kernels with few scores per thread.
__device__ __forceinline__ float cap_exactly(float x, float c) { return c * tanhf(x / c); }

// Whether tanh may have an absolute error of 3e-7.
__device__ __forceinline__ bool coarse_tanh(const Problem& p) {
  return p.dtype != DType::kF32 && p.spec.softcap <= kMaxCoarseSoftcap;
}

// Calls f(x, tanh(inner · x), slot, n, e) for every element x of S. If `coarse`, tanh may have an absolute
// error of 3e-7; then the warp votes for the cheapest formula that serves all of its elements.
template <class S, class F>
__device__ __forceinline__ void for_each_tanh(S& s, float inner, bool coarse, F f) {
  auto each = [&](auto tanh) {
    for_each(s, [&](float& x, int slot, int n, int e) { f(x, tanh(x * inner), slot, n, e); });
  };
  if (coarse) {
    float largest = 0;
    for_each(s, [&](float& x, int, int, int) { largest = fmaxf(largest, fabsf(x)); });
    if (__any_sync(~0u, largest * fabsf(inner) > 1)) {
      each([](float x) { return tanh_absolute(x); });
    } else {
      each([](float x) { return tanh_polynomial(x); });
    }
  } else {
    each([](float x) { return tanh_relative(x); });
  }
}

// The argument g of cap() for callers that need no derivative.
struct NoGradient {
  __device__ __forceinline__ void operator()(float, int, int, int) const {}
};

// S ← log2(e) · c · tanh(scale · S / c) with tanh_relative(), and calls g(1 − tanh², slot, n, e), with the
// derivative, for every element.
template <class S, class G>
__device__ __forceinline__ void cap(S& s, float c, float scale, G g) {
  const float inner = scale / c, outer = c * kLog2e;
  for_each(s, [&](float& x, int slot, int n, int e) {
    const float t = tanh_relative(x * inner);
    g(1.0f - t * t, slot, n, e);
    x = outer * t;
  });
}

// cap() for scores to which a bias has been added: S ← log2(e) · c · tanh(S / c), where −∞ stays −∞. It
// always uses tanh_relative, because the three formulas of for_each_tanh() would make the general kernels
// larger.
template <class S, class G>
__device__ __forceinline__ void cap_biased(S& s, float c, G g) {
  const float inner = 1 / c, outer = c * kLog2e;
  for_each(s, [&](float& x, int slot, int n, int e) {
    const float t = tanh_relative(x * inner);
    g(1.0f - t * t, slot, n, e);
    x = x == -INFINITY ? x : outer * t;
  });
}

// log2(e) · c · tanh(s · scale / c), a polynomial in s where |s · scale / c| ≤ 1. The absolute error is c
// times that of tanh.
struct Softcap {
  float inner, outer, both;  // scale / c, c · log2(e), their product

  __device__ __forceinline__ explicit Softcap(const AttentionSpec& spec)
      : inner(spec.scale * ptx::reciprocal(spec.softcap)),
        outer(spec.softcap * kLog2e),
        both(spec.scale * kLog2e) {}

  // S [rows from row(), keys from `key`] ← softcap(S) + shift. A warp's largest visible |S| chooses the
  // formula. Hidden scores may be anything, so they are cleared if the largest |S| of all scores is too large
  // for the cheapest formula.
  template <class S, class Row>
  __device__ __forceinline__ void apply(S& s, float shift, const Band& band, Row row, int32_t key) const {
    float top = largest(s);
    bool small = __all_sync(~0u, top <= 0.35f);
    if (!small && !all_seen(s, band, row(), key)) {
      clear_unseen(s, band, row(), key);
      top = largest(s);
      small = __all_sync(~0u, top <= 0.35f);
    }
    if (small) {  // tanh with an error of 5e-7
      polynomial(s, shift, {9.999902052e-1f, -3.326841051e-1f, 1.224803692e-1f});
    } else if (__all_sync(~0u, top <= 1)) {  // tanh with an error of 3e-7
      polynomial(s, shift,
                 {9.999968539e-1f, -3.332400380e-1f, 1.325352526e-1f, -5.097286290e-2f, 1.611418020e-2f,
                  -2.839465134e-3f});
    } else {
      // 1 − 2 / (1 + e^2x), with an error of 3e-7.
      const float twice = 2 * kLog2e * inner, top = outer + shift;
      for_each(s, [&](float& x, int, int, int) {
        x = fmaf(-2 * outer, ptx::reciprocal(1.0f + ptx::exp2(x * twice)), top);
      });
    }
  }

  // S ← softcap(S), and calls g(softcap'(S), slot, n, e) for every element.
  template <class S, class G>
  __device__ __forceinline__ void differentiate(S& s, G g) const {
    const auto each = [&](auto capped) {
      const float squared = 1 / (outer * outer);
      for_each(s, [&](float& x, int slot, int n, int e) {
        x = capped(x);
        g(fmaf(x * x, -squared, 1.0f), slot, n, e);
      });
    };
    if (__all_sync(~0u, largest(s) <= 0.35f)) {  // tanh with an error of 5e-7
      const float a = 9.999902052e-1f * both, b = -3.326841051e-1f * both * (inner * inner),
                  c = 1.224803692e-1f * both * (inner * inner) * (inner * inner);
      each([=](float x) {
        const float square = x * x;
        return x * fmaf(fmaf(c, square, b), square, a);
      });
    } else {
      const float twice = 2 * kLog2e * inner;
      each([=, *this](float x) {
        return fmaf(-2 * outer, ptx::reciprocal(1.0f + ptx::exp2(x * twice)), outer);
      });
    }
  }

  // Transposed S ← 4 P, dP ← dS. As |S| ≤ c, no lse is too large (gradient.cuh). wait_dp() is called before
  // dP is read. The number of a warp's instructions limits the backward, so the formulas are only as exact as
  // the rounding of P and dS to 16 bits needs.
  template <class S, class Rows, class Wait>
  __device__ __forceinline__ void fuse_gradient(S& s, S& dp, const Rows& rows, Wait wait_dp) const {
    // f(x) returns a linear function y of tanh, which gives log2(4 P) = exponent · y + offset − lse, and
    // tanh' / 4.
    const auto each = [&](float exponent, float offset, auto f) {
      for_each(s, [&](float& x, int slot, int n, int e) {
        float& ds = dp.at(slot, n, e);
        const auto [power, quarter] = f(x);
        x = ptx::exp2(fmaf(power, exponent, offset - rows.lse(slot)));
        ds = (ds - rows.delta(slot)) * quarter * x;
      });
    };
    const bool small = __all_sync(~0u, largest(s) <= 0.4f);
    wait_dp();
    if (small) {  // y = tanh / 2, error 1.2e-6; tanh' / 4 = 1 / 4 − y², error of tanh' 2e-6
      const float square_inner = inner * inner, a = 0.5f * 9.999937548e-1f * inner,
                  b = 0.5f * -3.326259279e-1f * inner * square_inner,
                  c = 0.5f * 1.212789662e-1f * inner * (square_inner * square_inner);
      each(2 * outer, 2, [=](float x) {
        const float square = x * x, half = x * fmaf(fmaf(c, square, b), square, a);
        return float2{half, fmaf(-half, half, 0.25f)};
      });
    } else {  // r = 1 / (1 + e^2x): tanh = 1 − 2 r, error 3e-7; tanh' / 4 = r − r²
      const float twice = 2 * kLog2e * inner;
      each(-2 * outer, 2 + outer, [=](float x) {
        const float r = ptx::reciprocal(1.0f + ptx::exp2(x * twice));
        return float2{r, fmaf(-r, r, r)};
      });
    }
  }

 private:
  // The lane's largest |s · scale / c|, or NaN. It compares the bits as integers, which for floats ≥ 0 gives
  // the same order, because sm_90 takes the maximum of three integers in one instruction.
  template <class S>
  __device__ __forceinline__ float largest(const S& s) const {
    const auto magnitude = [&](int slot, int n) {
      return __float_as_int(fmaxf(fabsf(s.at(slot, n, 0)), fabsf(s.at(slot, n, 1))));
    };
    int top = 0;
#pragma unroll
    for (int slot = 0; slot < S::kSlots; ++slot)
#pragma unroll
      for (int n = 0; n < S::kColumnTiles; n += 2)
        top = ptx::max3(top, magnitude(slot, n), magnitude(slot, min(n + 1, S::kColumnTiles - 1)));
    return __int_as_float(top) * fabsf(inner);
  }

  template <class S, int kTerms>
  __device__ __forceinline__ void polynomial(S& s, float shift, const float (&tanh_terms)[kTerms]) const {
    float c[kTerms], power = both;
#pragma unroll
    for (int i = 0; i < kTerms; ++i) c[i] = tanh_terms[i] * power, power *= inner * inner;
    for_each(s, [&](float& x, int, int, int) {
      const float square = x * x;
      float p = c[kTerms - 1];
#pragma unroll
      for (int i = kTerms - 2; i >= 0; --i) p = fmaf(p, square, c[i]);
      x = fmaf(x, p, shift);
    });
  }
};

// The score variant for calls whose only score option is the softcap.
template <class S>
struct SoftcapScore : ScoreVariant<S> {
  static constexpr bool kPositional = true;
  // |S| ≤ c, so a P of bfloat16, which has float32's range, needs no row maximum.
  static constexpr bool kScalesGradient = true;
  static constexpr bool kFusesGradient = S::kTransposed;
  static constexpr float kWeightScale = kFusesGradient ? 4 : 1;
  template <class T, class M = float>
  using Softmax = std::conditional_t<std::is_same_v<T, __nv_bfloat16>, BoundedSoftmax<S::kSlots>,
                                     OnlineSoftmax<S::kSlots>>;
  __device__ __forceinline__ static float power_scale(const AttentionSpec&) { return 1; }
  template <class Softmax>
  __device__ __forceinline__ static float start(const Problem& p) {
    return Softmax::kBounded ? p.spec.softcap : 1;
  }
  template <class Scores, class Tile, class Softmax>
  __device__ __forceinline__ void apply(Scores& s, const Tile& tile, const Softmax& softmax) {
    const float shift = Softmax::kBounded ? softmax.shift[0] : 0;
    Softcap(tile.p.spec).apply(s, shift, tile.band(), [&tile] { return tile.row(); }, tile.key);
  }
  template <GradientOf kOf, class Tile>
  __device__ __forceinline__ void differentiate(S& s, S& dp, const Tile& tile) {
    Softcap(tile.p.spec).differentiate(s, [&](float gradient, int slot, int n, int e) {
      if constexpr (kOf == GradientOf::kProduct) dp.at(slot, n, e) *= gradient;
    });
  }
  template <class Tile, class Rows, class Wait>
  __device__ __forceinline__ void fuse_gradient(S& s, S& dp, const Tile& tile, const Rows& rows,
                                                Wait wait_dp) const {
    Softcap(tile.p.spec).fuse_gradient(s, dp, rows, wait_dp);
  }
};

}  // namespace jax_flash
