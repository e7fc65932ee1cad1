// The score variants on sm_90a for calls whose only score option is a bias, of the call's dtype or float32.
#pragma once

#include <cmath>

#include "cuda/load/hopper_bias.cuh"
#include "cuda/score/bias.cuh"
#include "cuda/score/variant.cuh"

namespace jax_flash {

// The forward's variant; TMA loads its tiles of the bias.
template <class S>
struct BiasScore : ScoreVariant<S> {
  template <class T, int N, int kStages, int kConsumers>
  using Input = BiasInput<T, N, kStages, kConsumers>;

  __device__ __forceinline__ static float power_scale(const AttentionSpec&) { return kLog2e; }
  template <class Softmax>
  __device__ __forceinline__ static float start(const Problem&) {
    return kLog2e;
  }
  // S ← scale · S + bias
  template <class Scores, class Tile, class Softmax>
  __device__ __forceinline__ void apply(Scores& s, const Tile& tile, const Softmax&) {
    const float scale = tile.p.spec.scale;
    tile.shared.input_pipe.wait_full(tile.input_use);
    Tile::Input::for_each(s, tile.shared, tile.p, tile.consumer, tile.input_use,
                          [scale](float& x, float bias) {
                            if constexpr (Softmax::template kFindsNan<Scores>) {
                              x = fmaf(x, scale, bias);
                            } else {
                              scale_and_add_bias(x, scale, bias);
                            }
                          });
  }
  template <bool kScalarDropout, class Scores, class Tile, class Softmax>
  __device__ __forceinline__ void exponentiate(Scores& s, const Tile& tile, Softmax& softmax,
                                               float (&alpha)[S::kSlots], int early) {
    update(s, tile, softmax, alpha);
    softmax.exponentiate(s, 0, early);
  }

 protected:
  // m ← max(m, S); α. A bias of −∞ may hide a NaN. Such a NaN reaches the maximum of its row, so elements are
  // tested only if a maximum is NaN, because testing all of them costs 7 to 10% of the pass.
  template <class Scores, class Tile, class Softmax>
  __device__ __forceinline__ static void update(Scores& s, const Tile& tile, Softmax& softmax,
                                                float (&alpha)[S::kSlots]) {
    if constexpr (Softmax::template kFindsNan<Scores>) {
      softmax.update(s, alpha, [&] {
        Tile::Input::for_each(s, tile.shared, tile.p, tile.consumer, tile.input_use,
                              [](float& x, float bias) {
                                if (bias == -INFINITY) x = -INFINITY;
                              });
      });
    } else {
      softmax.update(s, alpha);
    }
    tile.shared.input_pipe.release(tile.input_use);
  }
};

template <class S>
struct FloatBiasScore : BiasScore<S> {
  template <class, int N, int kStages, int kConsumers>
  using Input = BiasInput<float, N, kStages, kConsumers>;
};

// The variant of kernels that compute gradients. It reads the tiles of load/score_tiles.cuh, whichever copy
// loaded them.
template <class S>
struct StagedBiasScore : ScoreVariant<S> {
  static constexpr bool reads(Operand operand) { return operand == Operand::kBias; }
  __device__ __forceinline__ static float power_scale(const AttentionSpec&) { return kLog2e; }
  template <GradientOf kOf, class Tile>
  __device__ __forceinline__ void differentiate(S& s, S&, const Tile& tile) {
    // A NaN that a bias of −∞ hides is multiplied by dS = 0 later, or the bias' gradient clears its sum.
    const float scale = tile.p.spec.scale;
    tile.apply_tiles(s, [scale](float& x, float bias) { x = fmaf(x, scale, bias); });
  }
};

}  // namespace jax_flash
