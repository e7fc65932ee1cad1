// The sm_90a variants of the general score, without and with dropout.
#pragma once

#include "cuda/mask.cuh"
#include "cuda/score/dropout.cuh"
#include "cuda/score/general.cuh"
#include "cuda/score/segments.cuh"
#include "cuda/score/variant.cuh"

namespace jax_flash {

// Any options but dropout.
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

}  // namespace jax_flash
