// A 16-bit bias alone on sm_90a.
#pragma once

#include "cuda/load/hopper_bias.cuh"
#include "cuda/score/bias.cuh"
#include "cuda/score/variant.cuh"

namespace jax_flash {

// In the forward, with tiles by TMA.
template <class S>
struct BiasScore : ScoreVariant<S> {
  template <class T, int N, int kStages, int kConsumers>
  using Input = BiasInput<T, N, kStages, kConsumers>;

  __device__ __forceinline__ static float power_scale(const AttentionSpec&) { return kLog2e; }
  template <class Softmax>
  __device__ __forceinline__ static float start(const Problem&) {
    return kLog2e;
  }
  template <class Scores, class Tile, class Softmax>
  __device__ __forceinline__ void apply(Scores& s, const Tile& tile, const Softmax&) {
    Tile::Input::add(s, tile.shared, tile.p.spec.scale, tile.consumer, tile.input_use);
  }
};

// In kernels that compute gradients, with tiles of any origin (load/score_tiles.cuh).
template <class S>
struct StagedBiasScore : ScoreVariant<S> {
  static constexpr bool reads(Operand operand) { return operand == Operand::kBias; }
  __device__ __forceinline__ static float power_scale(const AttentionSpec&) { return kLog2e; }
  template <GradientOf kOf, class Tile>
  __device__ __forceinline__ void differentiate(S& s, S&, const Tile& tile) {
    const float scale = tile.p.spec.scale;
    tile.apply_tiles(s, [scale](float& x, float bias) { scale_and_add_bias(x, scale, bias); });
  }
};

}  // namespace jax_flash
