// The score variants of the sm_90a kernels.
#pragma once

#include "core/plan.h"
#include "cuda/score/alibi.cuh"
#include "cuda/score/dropout.cuh"
#include "cuda/score/general.cuh"
#include "cuda/score/hopper_bias.cuh"
#include "cuda/score/hopper_segments.cuh"
#include "cuda/score/segments.cuh"
#include "cuda/score/softcap.cuh"
#include "cuda/score/variant.cuh"

namespace jax_flash {

// Dropout alone.
template <class S>
struct DropoutScore : ScoreVariant<S> {
  static constexpr bool kDropout = true, kDropoutInSoftmax = true, kPositional = true;
  KeptTile<S> kept;

  template <bool kScalarDropout, class Tile>
  __device__ __forceinline__ void prefetch(const Tile& tile, int32_t n) {
    if constexpr (kScalarDropout) {
      kept =
          tile.operands().dropout_at(tile.row(), n * ScoreVariant<S>::kKeys).template numbers_one_by_one<S>();
    }
  }
  // The numbers are drawn between the row maxima and the exponentials: both are long chains of dependent
  // instructions, which fill each other's stalls.
  template <bool kScalarDropout, class Scores, class Tile, class Softmax>
  __device__ __forceinline__ void exponentiate(Scores& s, const Tile& tile, Softmax& softmax,
                                               float (&alpha)[S::kSlots], int early) {
    softmax.update(s, alpha);
    if constexpr (!kScalarDropout)
      kept = tile.operands().dropout_at(tile.row(), tile.key).template numbers<S>();
    softmax.exponentiate(s, 0, early);
  }
  template <class Fragments>
  __device__ __forceinline__ void drop(Fragments& p) const {
    drop_fragments(p, kept);
  }
};

// Any options together.
template <class S>
struct GeneralVariant : ScoreVariant<S> {
  static constexpr bool kGeneral = true, kPositional = true;
  template <class T>
  using Softmax = OnlineSoftmax<S::kSlots>;
  InSegment in_segment;

  template <class Softmax>
  static __device__ __forceinline__ Softmax start(const AttentionSpec&) {
    return Softmax(1);
  }
  template <bool kScalarDropout, class Tile>
  __device__ __forceinline__ void prefetch(const Tile& tile, int32_t n) {
    in_segment = jax_flash::in_segment<S>(tile.p, tile.operands(), tile.band(), tile.row(),
                                          n * ScoreVariant<S>::kKeys);
  }
  template <class Scores, class Tile, class Softmax>
  __device__ __forceinline__ void apply(Scores& s, const Tile& tile, const Softmax&) {
    if (tile.p.spec.softcap > 0 && !all_seen(s, tile.band(), tile.row(), tile.key))
      clear_unseen(s, tile.band(), tile.row(), tile.key);
    GeneralScore(tile.p, tile.operands(), tile.band())
        .apply(s, tile.row(), tile.key, nullptr, nullptr, in_segment);
  }
};

// Any options, and dropout.
template <class S>
struct GeneralDropoutVariant : GeneralVariant<S> {
  static constexpr bool kDropout = true;
  KeptTile<S> kept;

  template <bool kScalarDropout, class Tile>
  __device__ __forceinline__ void prefetch(const Tile& tile, int32_t n) {
    GeneralVariant<S>::template prefetch<kScalarDropout>(tile, n);
    if (kScalarDropout || tile.operands().dropout.odd()) {
      kept =
          tile.operands().dropout_at(tile.row(), n * ScoreVariant<S>::kKeys).template numbers_one_by_one<S>();
    } else {
      kept = tile.operands().dropout_at(tile.row(), n * ScoreVariant<S>::kKeys).template numbers<S>();
    }
  }
  template <class Fragments>
  __device__ __forceinline__ void drop(Fragments& p) const {
    drop_fragments(p, kept);
  }
};

// A score kind's variant: VariantOf<kKind>::Score<S>.
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
