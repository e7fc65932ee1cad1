// A bias of the call's dtype beside a boolean mask, dropout or both, on sm_90a.
#pragma once

#include <cstdint>

#include "cuda/score/dropout.cuh"
#include "cuda/score/hopper_bias.cuh"
#include "cuda/score/hopper_general.cuh"

namespace jax_flash {

// The forward's variant. kAlways: whether all calls have a mask.
template <class S, bool kAlways>
struct BiasAndMaskScore : BiasScore<S> {
  static constexpr bool reads(Operand operand) { return operand == Operand::kMask; }
  ShownElements<S> shown;

  template <bool kScalarDropout = false, class Tile>
  __device__ __forceinline__ void prefetch(const Tile& tile, int32_t key) {
    if (kAlways || tile.p.mask) shown.take_mask(tile, key);
  }
  template <class Scores, class Tile, class Softmax>
  __device__ __forceinline__ void apply(Scores& s, const Tile& tile, const Softmax& softmax) {
    BiasScore<S>::apply(s, tile, softmax);
    if (kAlways || tile.p.mask) shown.hide(s);
  }
};
template <class S>
using BiasMaskScore = BiasAndMaskScore<S, true>;

template <class S>
struct BiasDropoutScore : WithDropout<BiasAndMaskScore<S, false>, S> {
  static constexpr bool kDropoutInSoftmax = true, kPositional = true;

  template <bool kScalarDropout = false, class Tile>
  __device__ __forceinline__ void prefetch(const Tile& tile, int32_t key) {
    BiasAndMaskScore<S, false>::prefetch(tile, key);
    if constexpr (kScalarDropout) this->draw_one_by_one(tile, key);
  }
  template <bool kScalarDropout, class Scores, class Tile, class Softmax>
  __device__ __forceinline__ void exponentiate(Scores& s, const Tile& tile, Softmax& softmax,
                                               float (&alpha)[S::kSlots], int early) {
    this->update(s, tile, softmax, alpha);
    if constexpr (!kScalarDropout) this->draw(tile, tile.key);
    softmax.exponentiate(s, 0, early);
  }
};

// The same for kernels that compute gradients, which stage only the bias.
template <class S, bool kAlways>
struct StagedBiasAndMaskScore : StagedBiasScore<S> {
  static constexpr bool reads(Operand operand) {
    return operand == Operand::kMask || StagedBiasScore<S>::reads(operand);
  }
  static constexpr bool kSharing = kAlways || S::kRows > kConsumerRows;  // d128 would spill with dropout
  ShownElements<S> shown;

  template <class Tile>
  __device__ __forceinline__ void prefetch_gradient(const Tile& tile) {
    if (kAlways || tile.p.mask) shown.template take_mask<kSharing>(tile, tile.key);
  }
  template <GradientOf kOf, class Tile>
  __device__ __forceinline__ void differentiate(S& s, S& dp, const Tile& tile) {
    StagedBiasScore<S>::template differentiate<kOf>(s, dp, tile);
    if (kAlways || tile.p.mask) shown.hide(s);
  }
};
template <class S>
using StagedBiasMaskScore = StagedBiasAndMaskScore<S, true>;
template <class S>
using StagedBiasDropoutScore = WithDropout<StagedBiasAndMaskScore<S, false>, S>;

}  // namespace jax_flash
