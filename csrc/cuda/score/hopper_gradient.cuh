// The score variants of the sm_90a kernels that compute gradients, by kind. A producer warp stages tiles of
// the bias and the mask (load/score_tiles.cuh); a variant reads them by Tile::apply_tiles().
#pragma once

#include <type_traits>

#include "cuda/load/score_tiles.cuh"
#include "cuda/score/hopper_variants.cuh"
#include "cuda/score/mask.cuh"

namespace jax_flash {

// Any options, including dropout.
template <class S>
struct StagedGeneralScore : HopperGeneralDropoutScore<S> {
  static constexpr bool reads(Operand) { return true; }
};

template <class S>
using StagedMaskDropoutScore = WithDropout<StagedMaskScore<S>, S>;

template <ScoreKind kKind, class S>
struct GradientScoreOf;
#define JF_SCORE(kind, name, printed, inputs, option, served, portable, hopper, gradient, ...) \
  template <class S>                                                                           \
  struct GradientScoreOf<ScoreKind::k##kind, S> : std::type_identity<gradient<S>> {};
#include "scores.def"

template <ScoreKind kKind, class S>
using GradientScore = typename GradientScoreOf<kKind, S>::type;

constexpr bool stages_float_bias(ScoreKind kind) { return stages(kind, kFloatBiasTiles); }
constexpr bool stages_bias(ScoreKind kind) { return stages(kind, kBiasTiles | kFloatBiasTiles); }
constexpr bool stages_tiles(ScoreKind kind) { return stages_bias(kind) || stages_mask(kind); }

// Bytes of a tile [M, N] of the bias and of the mask.
constexpr int score_tile_bytes(ScoreKind kind, int block_m, int block_n) {
  return block_m * block_n *
         ((stages_float_bias(kind) ? 4
           : stages_bias(kind)     ? 2
                                   : 0) +
          (stages_mask(kind) ? 1 : 0));
}

// The tiles [M, N] that a kind stages: as many stages as fit into `bytes`, at most two.
template <ScoreKind kKind, class T, int M, int N, int bytes, bool kOneRow>
struct GradientTilesOf {
  static constexpr int kStages = 2 * score_tile_bytes(kKind, M, N) <= bytes ? 2 : 1;
  using Bias = std::conditional_t<stages_float_bias(kKind), float, T>;
  using type =
      std::conditional_t<stages_tiles(kKind),
                         ScoreTiles<Bias, M, N, kStages, stages_bias(kKind), stages_mask(kKind), kOneRow>,
                         NoScoreTiles>;
};

template <ScoreKind kKind, class T, int M, int N, int bytes, bool kOneRow = false>
using GradientTiles = typename GradientTilesOf<kKind, T, M, N, bytes, kOneRow>::type;

}  // namespace jax_flash
