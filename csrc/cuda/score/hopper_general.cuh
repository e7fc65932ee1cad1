// The sm_90a variants of the general score, without and with dropout.
#pragma once

#include "cuda/mask.cuh"
#include "cuda/score/dropout.cuh"
#include "cuda/score/general.cuh"
#include "cuda/score/segment_ranges.cuh"

namespace jax_flash {

// Any options except dropout. While the tensor cores compute S, this finds out whether all keys of the tile,
// or none, belong to the rows' own segment.
template <class S>
struct HopperGeneralScore : GeneralScore<S, false> {
  InSegment in_segment;

  template <class Softmax>
  __device__ __forceinline__ static float start(const Problem&) {
    return 1;
  }
  template <bool kScalarDropout, class Tile>
  __device__ __forceinline__ void prefetch(const Tile& tile, int32_t key) {
    in_segment = jax_flash::in_segment<S>(tile.p, tile.operands(), tile.band(), tile.row(), key);
  }
  template <class Scores, class Tile, class Softmax>
  __device__ __forceinline__ void apply(Scores& s, const Tile& tile, const Softmax&) {
    if (tile.p.spec.softcap > 0 && !all_seen(s, tile.band(), tile.row(), tile.key))
      clear_unseen(s, tile.band(), tile.row(), tile.key);
    this->score(s, tile, in_segment, NoGradient{});
  }
  template <class Tile>
  __device__ __forceinline__ void prefetch_gradient(const Tile& tile) {
    in_segment = in_segment_of<S>(tile);
  }
  template <GradientOf kOf, class Tile>
  __device__ __forceinline__ void differentiate(S& s, S& dp, const Tile& tile) {
    this->template differentiate_in<kOf>(s, dp, tile, in_segment);
  }
};

// Any options, including dropout.
template <class S>
struct HopperGeneralDropoutScore : WithDropout<HopperGeneralScore<S>, S> {
  template <bool kScalarDropout, class Tile>
  __device__ __forceinline__ void prefetch(const Tile& tile, int32_t key) {
    HopperGeneralScore<S>::template prefetch<kScalarDropout>(tile, key);
    if (kScalarDropout || tile.operands().dropout.needs_scalar_path()) {
      this->draw_one_by_one(tile, key);
    } else {
      this->draw(tile, key);
    }
  }
};

}  // namespace jax_flash
