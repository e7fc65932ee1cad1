// The general score: scale, softcap, bias, ALiBi, segments and mask, one pass over the tile for each that the
// call has. Which it has is the same for the whole grid.
#pragma once

#include <cmath>
#include <type_traits>

#include "core/band.h"
#include "core/score.h"
#include "cuda/score/alibi.cuh"
#include "cuda/score/bias.cuh"
#include "cuda/score/operands.cuh"
#include "cuda/score/softcap.cuh"
#include "cuda/tile/accumulator.cuh"

namespace jax_flash {

// For the tile of S whose warp begins at query `row` and whose keys begin at `key`, within the sequence.
// Operands are read only where row and key are in use.
class GeneralScore {
 public:
  __device__ __forceinline__ GeneralScore(const Problem& problem, const ScoreOperands& score_operands,
                                          const Band& visible)
      : p(problem), operands(score_operands), band(visible) {}

  // The factor that turns the scores of apply(…, unit, …) into powers of two: the softmax's scale. It is 1
  // unless softcap bounds the scores, so that the softmax's fma(s, scale, shift) rounds no product.
  __device__ __forceinline__ float unit() const { return p.spec.softcap > 0 && !adds() ? own_unit() : 1.0f; }

  // Loads a 16-bit bias, which apply() will add, while S is being multiplied.
  template <class S>
  __device__ __forceinline__ void fetch(BiasChunks<S>& bias, int32_t row, int32_t key) const {
    GlobalBias(p, operands, band).fetch(bias, row, key);
  }

  // S ← log2(e) · (softcap(scale · S) + bias − slope · distance), −inf where segments or mask hide the key.
  // `gradient`: nullptr, or the gradient of softcap's result, which becomes that of scale · S. `bias`:
  // nullptr, or what fetch() loaded. `in_segment`: what is known of the tile.
  template <class S>
  __device__ __forceinline__ void apply(S& s, int32_t row, int32_t key,
                                        std::type_identity_t<S>* gradient = nullptr,
                                        const BiasChunks<std::type_identity_t<S>>* bias = nullptr,
                                        InSegment in_segment = InSegment::kSome) const {
    if (p.spec.softcap > 0) {
      cap(s, gradient);
    } else {
      const float scale = p.spec.scale * kLog2e;
      for_each(s, [&](float& x, int, int, int) { x *= scale; });
    }
    add_and_hide(s, row, key, kLog2e, bias, in_segment);
  }

  // S ← the same / unit.
  template <class S>
  __device__ __forceinline__ void apply(S& s, int32_t row, int32_t key, float unit,
                                        const BiasChunks<S>& bias) const {
    if (p.spec.softcap > 0) {
      const float inner = p.spec.scale / p.spec.softcap;
      for_each_tanh(s, inner, coarse_tanh(), [](float& x, float t, int, int, int) { x = t; });
    } else if (!(p.spec.scale > 0)) {
      for_each(s, [&](float& x, int, int, int) { x *= p.spec.scale; });
    }
    if (unit == 1.0f) {
      const float factor = own_unit();
      for_each(s, [&](float& x, int, int, int) { x *= factor; });
    }
    add_and_hide(s, row, key, kLog2e / unit, &bias);
  }

 private:
  __device__ __forceinline__ bool adds() const { return p.bias || p.alibi_slopes; }
  __device__ __forceinline__ float own_unit() const {
    return kLog2e * (p.spec.softcap > 0 ? p.spec.softcap : p.spec.scale > 0 ? p.spec.scale : 1.0f);
  }

  // S ← S + factor · (bias − slope · distance), −inf where segments or mask hide the key.
  template <class S>
  __device__ __forceinline__ void add_and_hide(S& s, int32_t row, int32_t key, float factor,
                                               const BiasChunks<S>* bias,
                                               InSegment in_segment = InSegment::kSome) const {
    if (p.bias) GlobalBias(p, operands, band).add(s, row, key, factor, bias);
    if (p.alibi_slopes) {
      subtract_distances(
          s, operands.slope * factor,
          [&](int slot) {
            return static_cast<float>(band.diagonal(row + S::row(slot)) - key - S::column(0));
          },
          [](float x) { return x; });
    }
    if (p.q_segment_ids && in_segment == InSegment::kSome) hide_other_segments(s, row, key);
    if (in_segment == InSegment::kNone) for_each(s, [](float& x, int, int, int) { x = -INFINITY; });
    if (p.mask) {
      for_each_used<uint8_t>(s, operands.mask, p.mask, band, row, key, [](float& x, uint8_t seen) {
        if (!seen) x = -INFINITY;
      });
    }
  }

  template <class S>
  __device__ __forceinline__ void cap(S& s, S* gradient) const {
    const float c = p.spec.softcap, inner = p.spec.scale / c, outer = c * kLog2e;
    for_each_tanh(s, inner, coarse_tanh(), [&](float& x, float t, int slot, int n, int e) {
      if (gradient) gradient->at(slot, n, e) *= 1.0f - t * t;
      x = outer * t;
    });
  }

  // tanh's error, times c, has to stay below the rounding of P to 16 bits.
  __device__ __forceinline__ bool coarse_tanh() const {
    return p.dtype != DType::kF32 && p.spec.softcap <= 64;
  }

  template <class S>
  __device__ __forceinline__ void hide_other_segments(S& s, int32_t row, int32_t key) const {
#pragma unroll
    for (int n = 0; n < S::kColumnTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int32_t j = key + S::column(n) + e;
        const int32_t segment = j < band.k_len ? operands.kv_segments[j] : 0;
#pragma unroll
        for (int slot = 0; slot < S::kSlots; ++slot) {
          const int32_t i = row + S::row(slot);
          if (i < band.q_len && j < band.k_len && operands.q_segments[i] != segment)
            s.at(slot, n, e) = -INFINITY;
        }
      }
    }
  }

  const Problem& p;
  const ScoreOperands& operands;
  const Band& band;
};

}  // namespace jax_flash
