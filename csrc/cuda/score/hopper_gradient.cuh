// The score variants of the sm_90a kernels that compute gradients, by kind. Bias and mask come to them in
// tiles that a producer warp stages (score/score_tiles.cuh): Tile::apply_tiles().
#pragma once

#include <type_traits>

#include "cuda/score/hopper_variants.cuh"
#include "cuda/score/score_tiles.cuh"

namespace jax_flash {

// S ← scale · S + bias.
template <class S>
struct StagedBiasScore : ScoreVariant<S> {
  static constexpr bool reads(Operand operand) { return operand == Operand::kBias; }
  __device__ __forceinline__ static float power_scale(const AttentionSpec&) { return kLog2e; }
  template <GradientOf kOf, class Tile>
  __device__ __forceinline__ void differentiate(S& s, S&, const Tile& tile) {
    const float scale = tile.p.spec.scale;
    tile.apply_tiles(s, [scale](float& x, float bias) { x = fmaf(x, scale, bias); });
  }
};

// S ← −inf where the mask hides the key.
template <class S>
struct StagedMaskScore : ScoreVariant<S> {
  static constexpr bool reads(Operand operand) { return operand == Operand::kMask; }
  template <GradientOf kOf, class Tile>
  __device__ __forceinline__ void differentiate(S& s, S&, const Tile& tile) {
    tile.apply_tiles(s, [](float&, float) {});
  }
};

// Any options, and dropout.
template <class S>
struct StagedGeneralScore : HopperGeneralDropoutScore<S> {
  static constexpr bool reads(Operand) { return true; }
};

template <ScoreKind kKind, class S>
struct GradientScoreOf : HopperScoreOf<kKind, S> {};
template <class S>
struct GradientScoreOf<ScoreKind::kBias, S> : std::type_identity<StagedBiasScore<S>> {};
template <class S>
struct GradientScoreOf<ScoreKind::kMask, S> : std::type_identity<StagedMaskScore<S>> {};
template <class S>
struct GradientScoreOf<ScoreKind::kGeneralDropout, S> : std::type_identity<StagedGeneralScore<S>> {};

template <ScoreKind kKind, class S>
using GradientScore = typename GradientScoreOf<kKind, S>::type;

// Whether a kind stages tiles of bias or mask.
constexpr bool stages_tiles(ScoreKind kind) {
  return kind == ScoreKind::kBias || kind == ScoreKind::kMask || kind == ScoreKind::kGeneralDropout;
}

// What a kind stages: tiles [M, N], as many as `bytes` hold, two at most.
template <ScoreKind kKind, class T, int M, int N, int bytes>
struct GradientTilesOf {
  static constexpr bool kBias = kKind == ScoreKind::kBias || kKind == ScoreKind::kGeneralDropout,
                        kMask = kKind == ScoreKind::kMask || kKind == ScoreKind::kGeneralDropout;
  static constexpr int kTile = M * N * ((kBias ? static_cast<int>(sizeof(T)) : 0) + (kMask ? 1 : 0)),
                       kStages = 2 * kTile <= bytes ? 2 : 1;
  using type = std::conditional_t<kBias || kMask, ScoreTiles<T, M, N, kStages, kBias, kMask>, NoScoreTiles>;
};

template <ScoreKind kKind, class T, int M, int N, int bytes>
using GradientTiles = typename GradientTilesOf<kKind, T, M, N, bytes>::type;

}  // namespace jax_flash
