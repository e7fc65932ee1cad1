// Segments alone on sm_90a.
#pragma once

#include "cuda/load/hopper_segments.cuh"
#include "cuda/score/segment_ranges.cuh"
#include "cuda/score/segments.cuh"
#include "cuda/score/variant.cuh"

namespace jax_flash {

template <class S>
struct SegmentScore : ScoreVariant<S> {
  static constexpr bool reads(Operand operand) {
    return operand == Operand::kQSegmentIds || operand == Operand::kKvSegmentIds;
  }
  InSegment in_segment;  // only in the backward
  template <class T, int N, int kStages, int kConsumers>
  using Input = SegmentInput<N, kConsumers>;

  template <class Scores, class Tile, class Softmax>
  __device__ __forceinline__ void apply(Scores& s, const Tile& tile, const Softmax&) {
    Tile::Input::hide(s, tile.shared, tile.operands(), tile.band(), tile.consumer, tile.row(),
                      tile.input_use);
  }
  template <class Tile>
  __device__ __forceinline__ void prefetch_gradient(const Tile& tile) {
    in_segment = in_segment_of<S>(tile);
  }
  template <GradientOf kOf, class Tile>
  __device__ __forceinline__ void differentiate(S& s, S&, const Tile& tile) {
    if (in_segment == InSegment::kNone) for_each(s, [](float& x, int, int, int) { x = -INFINITY; });
    if (in_segment == InSegment::kSome)
      hide_other_segments(s, tile.operands(), tile.band(), tile.row(), tile.key);
  }
};

}  // namespace jax_flash
