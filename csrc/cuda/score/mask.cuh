// The mask: S ← −inf where it hides the key.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/score/variant.cuh"

namespace jax_flash {

__device__ __forceinline__ void hide_unless(float& x, bool seen) {
  if (!seen) x = -INFINITY;
}

// The score with a mask alone, in kernels that compute gradients. They stage the mask in tiles
// (load/score_tiles.cuh).
template <class S>
struct StagedMaskScore : ScoreVariant<S> {
  static constexpr bool reads(Operand operand) { return operand == Operand::kMask; }
  template <GradientOf kOf, class Tile>
  __device__ __forceinline__ void differentiate(S& s, S&, const Tile& tile) {
    tile.apply_tiles(s, [](float&, float) {});
  }
};

}  // namespace jax_flash
