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
    tile.apply_tiles(s, [scale](float& x, float bias) { x = fmaf(under_bias(x, bias), scale, bias); });
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
struct GradientScoreOf;
#define JF_SCORE(kind, name, printed, inputs, option, served, portable, hopper, gradient, ...) \
  template <class S>                                                                           \
  struct GradientScoreOf<ScoreKind::k##kind, S> : std::type_identity<gradient<S>> {};
#include "scores.def"

template <ScoreKind kKind, class S>
using GradientScore = typename GradientScoreOf<kKind, S>::type;

// Whether a kind stages bias or mask in tiles.
enum ScoreTileSet { kBiasTiles = 1, kMaskTiles = 2 };
inline constexpr int kScoreTileSets[] = {
#define JF_SCORE(kind, name, printed, inputs, option, served, portable, hopper, gradient, tiles) tiles,
#include "scores.def"
};
constexpr bool stages_bias(ScoreKind kind) { return kScoreTileSets[static_cast<int>(kind)] & kBiasTiles; }
constexpr bool stages_mask(ScoreKind kind) { return kScoreTileSets[static_cast<int>(kind)] & kMaskTiles; }
constexpr bool stages_tiles(ScoreKind kind) { return stages_bias(kind) || stages_mask(kind); }

// Bytes of a tile [M, N] of a 16-bit bias and of the mask.
constexpr int score_tile_bytes(ScoreKind kind, int block_m, int block_n) {
  return block_m * block_n * ((stages_bias(kind) ? 2 : 0) + (stages_mask(kind) ? 1 : 0));
}

// What a kind stages: tiles [M, N], as many as `bytes` hold, two at most.
template <ScoreKind kKind, class T, int M, int N, int bytes>
struct GradientTilesOf {
  static constexpr int kStages = 2 * score_tile_bytes(kKind, M, N) <= bytes ? 2 : 1;
  using type =
      std::conditional_t<stages_tiles(kKind),
                         ScoreTiles<T, M, N, kStages, stages_bias(kKind), stages_mask(kKind)>, NoScoreTiles>;
};

template <ScoreKind kKind, class T, int M, int N, int bytes>
using GradientTiles = typename GradientTilesOf<kKind, T, M, N, bytes>::type;

}  // namespace jax_flash
