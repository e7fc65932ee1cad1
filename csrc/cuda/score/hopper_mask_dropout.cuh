// A boolean mask and dropout without other options, in the forward on sm_90a.
#pragma once

#include <cstdint>

#include "cuda/score/dropout.cuh"
#include "cuda/score/hopper_general.cuh"

namespace jax_flash {

template <class S>
struct MaskDropoutScore : DropoutScore<S> {
  static constexpr bool reads(Operand operand) {
    return operand == Operand::kMask || DropoutScore<S>::reads(operand);
  }
  ShownElements<S> shown;

  template <bool kScalarDropout = false, class Tile>
  __device__ __forceinline__ void prefetch(const Tile& tile, int32_t key) {
    DropoutScore<S>::template prefetch<kScalarDropout>(tile, key);
    shown.take_mask(tile, key);
  }
  template <class Scores, class Tile, class Softmax>
  __device__ __forceinline__ void apply(Scores& s, const Tile&, const Softmax&) const {
    shown.hide(s);
  }
};

}  // namespace jax_flash
