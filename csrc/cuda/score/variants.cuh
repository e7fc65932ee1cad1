// The score variants of the sm_90a kernels, by kind.
#pragma once

#include "core/plan.h"
#include "cuda/score/alibi.cuh"
#include "cuda/score/dropout.cuh"
#include "cuda/score/hopper_bias.cuh"
#include "cuda/score/hopper_general.cuh"
#include "cuda/score/hopper_segments.cuh"
#include "cuda/score/softcap.cuh"
#include "cuda/score/variant.cuh"

namespace jax_flash {

// VariantOf<kKind>::Score<S> is the variant of a kind.
template <ScoreKind kKind>
struct VariantOf;
template <>
struct VariantOf<ScoreKind::kPlain> {
  template <class S>
  using Score = PlainScore<S>;
};
template <>
struct VariantOf<ScoreKind::kGeneral> {
  template <class S>
  using Score = GeneralVariant<S>;
};
template <>
struct VariantOf<ScoreKind::kDropout> {
  template <class S>
  using Score = GeneralDropoutVariant<S>;
};
template <>
struct VariantOf<ScoreKind::kDropoutAlone> {
  template <class S>
  using Score = DropoutScore<S>;
};
template <>
struct VariantOf<ScoreKind::kSegments> {
  template <class S>
  using Score = SegmentScore<S>;
};
template <>
struct VariantOf<ScoreKind::kAlibi> {
  template <class S>
  using Score = AlibiScore<S>;
};
template <>
struct VariantOf<ScoreKind::kSoftcap> {
  template <class S>
  using Score = SoftcapScore<S>;
};
template <>
struct VariantOf<ScoreKind::kBias> {
  template <class S>
  using Score = BiasScore<S>;
};

}  // namespace jax_flash
