// The general score: scale, softcap, bias, ALiBi, segments, ranges, blocks and mask. Each option that the
// call has is one pass over the tile; the whole grid has the same options.
#pragma once

#include <cmath>
#include <type_traits>

#include "core/band.h"
#include "core/score.h"
#include "cuda/load/global_bias.cuh"
#include "cuda/score/alibi.cuh"
#include "cuda/score/bias.cuh"
#include "cuda/score/blocks.cuh"
#include "cuda/score/dropout.cuh"
#include "cuda/score/mask.cuh"
#include "cuda/score/operands.cuh"
#include "cuda/score/ranges.cuh"
#include "cuda/score/segments.cuh"
#include "cuda/score/softcap.cuh"
#include "cuda/score/variant.cuh"
#include "cuda/tile/accumulator.cuh"

namespace jax_flash {

// Any options except dropout. Operands are read only where row and key are in use. kHidesAll: also hides what
// ranges, blocks and masks hide. Variants of sm_90a, which take no blocks, do that with bits.
template <class S, bool kHidesAll = true>
struct GeneralScore : ScoreVariant<S> {
  static constexpr bool kGeneral = true, kPositional = true, kScalesGradient = true;
  // A lane of a transposed S has no adjacent keys, so it would read bias and mask element by element.
  // Instead, the tile may stage them: Tile::apply_tiles().
  static constexpr bool kBiasAndMask = !S::kTransposed;
  static constexpr bool reads(Operand operand) {
    return operand != Operand::kDropout && (kHidesAll || operand != Operand::kBlockMask) &&
           (kBiasAndMask || (operand != Operand::kBias && operand != Operand::kMask));
  }
  template <class T, class M = float>
  using Softmax = OnlineSoftmax<S::kSlots>;
  BiasChunks<S> bias;  // if S is permuted

  // The softmax computes 2^(factor · S + shift) from the scores of apply(); this is the factor. It is 1,
  // which makes the product exact, unless softcap bounds the scores.
  template <class Softmax>
  __device__ __forceinline__ static float start(const Problem& p) {
    return p.spec.softcap > 0 && !p.bias && !p.alibi_slopes ? unit(p.spec) : 1.0f;
  }

  template <bool kScalarDropout = false, class Tile>
  __device__ __forceinline__ void prefetch(const Tile& tile, int32_t key) {
    if constexpr (S::kPermuted) global_bias(tile).fetch(bias, tile.row(), key);
  }

  // S ← (softcap(scale · S) + bias − slope · distance) · log2(e) / softmax.scale, −inf where segments, ranges
  // or mask hide the key.
  template <class Tile, class Softmax>
  __device__ __forceinline__ void apply(S& s, const Tile& tile, const Softmax& softmax) {
    const AttentionSpec& spec = tile.p.spec;
    const int32_t row = tile.row();
    const float factor = kLog2e / softmax.scale;
    const bool first = spec.bias_first;
    if (spec.softcap > 0 && !first) {
      for_each_tanh(s, spec.scale / spec.softcap, coarse_tanh(tile.p),
                    [](float& x, float t, int, int, int) { x = t; });
    } else if (first || !(spec.scale > 0)) {
      for_each(s, [&](float& x, int, int, int) { x *= spec.scale; });
    }
    if (softmax.scale == 1.0f && !first) {
      const float scale = unit(spec);
      for_each(s, [&](float& x, int, int, int) { x *= scale; });
    }
    add(s, tile, row, first ? 1 : factor);
    if (first) cap_biased(s, spec.softcap, NoGradient{});
    subtract_and_hide(s, tile, row, factor, InSegment::kSome);
  }

  __device__ __forceinline__ static float power_scale(const AttentionSpec&) { return 1; }
  template <GradientOf kOf, class Tile>
  __device__ __forceinline__ void differentiate(S& s, S& dp, const Tile& tile) {
    differentiate_in<kOf>(s, dp, tile, InSegment::kSome);
  }

 protected:
  // differentiate() with what is known of the tile's segments.
  template <GradientOf kOf, class Tile>
  __device__ __forceinline__ void differentiate_in(S& s, S& dp, const Tile& tile, InSegment in_segment) {
    score(s, tile, in_segment, [&](float gradient, int slot, int n, int e) {
      if (kOf == GradientOf::kProduct || tile.p.spec.bias_first) dp.at(slot, n, e) *= gradient;
    });
  }

  // S ← log2(e) · (softcap(scale · S) + bias − slope · distance), −inf where segments, ranges or mask hide
  // the key. `in_segment`: what is known of the tile's segments. If there is a softcap, it calls
  // differentiate(softcap's derivative, slot, n, e).
  template <class Scores, class Tile, class F>
  __device__ __forceinline__ void score(Scores& s, const Tile& tile, InSegment in_segment, F differentiate) {
    const AttentionSpec& spec = tile.p.spec;
    const int32_t row = tile.row();
    const bool first = spec.bias_first;
    if (spec.softcap > 0 && !first) {
      cap(s, tile, differentiate);
    } else {
      const float scale = first ? spec.scale : spec.scale * kLog2e;
      for_each(s, [&](float& x, int, int, int) { x *= scale; });
    }
    add(s, tile, row, first ? 1 : kLog2e);
    if (first) cap_biased(s, spec.softcap, differentiate);
    subtract_and_hide(s, tile, row, kLog2e, in_segment);
  }

 private:
  // S ← log2(e) · softcap(scale · S), and calls differentiate() as score() does.
  template <class Scores, class Tile, class F>
  __device__ __forceinline__ static void cap(Scores& s, const Tile& tile, F differentiate) {
    const AttentionSpec& spec = tile.p.spec;
    if (!coarse_tanh(tile.p)) {
      jax_flash::cap(s, spec.softcap, spec.scale, differentiate);
    } else if constexpr (std::is_same_v<F, NoGradient>) {
      Softcap(spec).apply(s, 0, tile.band(), [&tile] { return tile.row(); }, tile.key);
    } else {
      Softcap(spec).differentiate(s, differentiate);
    }
  }

  __device__ __forceinline__ static float unit(const AttentionSpec& spec) {
    return kLog2e * (spec.softcap > 0 ? spec.softcap : spec.scale > 0 ? spec.scale : 1.0f);
  }

  // S ← S + factor · bias, at one place for both orders, because a second copy of this code would double the
  // compile time. Staged tiles also apply the mask; the tangent's tiles add the bias's tangent to dS.
  template <class Scores, class Tile>
  __device__ __forceinline__ void add(Scores& s, const Tile& tile, int32_t row, float factor) {
    const auto add = [factor](float& x, float b) { add_bias(x, b, factor); };
    if constexpr (requires { tile.apply_tiles(s, add); }) {
      if (tile.p.bias || tile.p.mask) tile.apply_tiles(s, add);
    } else if constexpr (kBiasAndMask) {
      if (tile.p.bias) global_bias(tile).add(s, row, tile.key, factor, bias);
      if constexpr (requires { tile.add_tangent(); }) tile.add_tangent();
    }
  }

  template <class Tile>
  __device__ __forceinline__ static auto global_bias(const Tile& tile) {
    return GlobalBias<typename Tile::Element>(tile.p, tile.operands(), tile.band());
  }

  // Whether the mask is known to show all of S. The vote tells the compiler that the branch is uniform.
  template <class Tile>
  __device__ __forceinline__ static bool mask_shows_all(const Tile& tile, int32_t row) {
    if constexpr (requires { tile.operands().shown; }) {
      static_assert(kRowBlock % S::kRows == 0 && MaskTiles::block_keys % S::kColumns == 0);
      const Band& band = tile.band();
      const bool used = row < band.q_len && tile.key < band.k_len;
      return __all_sync(~0u, used && tile.operands().shows_all(row, tile.key));
    }
    return false;
  }

  // S ← S − factor · slope · distance, −inf where segments, ranges or mask hide the key.
  template <class Scores, class Tile>
  __device__ __forceinline__ void subtract_and_hide(Scores& s, const Tile& tile, int32_t row, float factor,
                                                    InSegment in_segment) {
    const Problem& p = tile.p;
    const ScoreOperands& operands = tile.operands();
    const Band& band = tile.band();
    constexpr bool kStaged = requires { tile.apply_tiles(s, [](float&, float) {}); };
    if (p.alibi_slopes) subtract_alibi(s, tile, row, operands.slope * factor, [](float x) { return x; });
    if (p.q_segment_ids && in_segment == InSegment::kSome)
      hide_other_segments(s, operands, band, row, tile.key);
    if (in_segment == InSegment::kNone) for_each(s, [](float& x, int, int, int) { x = -INFINITY; });
    if constexpr (kHidesAll) {
      if (p.ranges) hide_outside_ranges(s, operands.row_ranges(p), band, row, tile.key);
      if (p.block_mask) hide_outside_blocks(s, operands.block_mask(p), band, row, tile.key);
      if (!kStaged && kBiasAndMask && p.mask && !mask_shows_all(tile, row)) {
        for_each_used<uint8_t>(s, operands.mask, p.mask, band, row, tile.key,
                               [](float& x, uint8_t seen) { hide_unless(x, seen); });
      }
    }
  }
};

// Any options, including dropout.
template <class S>
using GeneralDropoutScore = WithDropout<GeneralScore<S>, S>;

}  // namespace jax_flash
