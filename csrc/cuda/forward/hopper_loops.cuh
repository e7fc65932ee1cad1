// The loops of cuda/forward/hopper_consumer.cuh over a consumer's key tiles.
#pragma once

#include <cstdint>

#include "core/band.h"
#include "cuda/forward/hopper_partner.cuh"
#include "cuda/hopper/roles.cuh"

namespace jax_flash {

// All visible key tiles, from the last to the first: masked ones at the band's end, ones that all rows see
// whole, masked ones at the band's beginning. kInput: whether the score's input has stages for them.
template <bool kRare = false, bool kInput = true, class Consumer>
__device__ __forceinline__ void attend(Consumer& of, const Interval& tiles) {
  using C = typename Consumer::Config;
  of.whole = uniform(of.tile->keys[of.consumer].whole);
  if constexpr (C::kQueryInRegisters) of.load_query();
  int32_t n = tiles.hi - 1;
  bool has_tail = false;
  if constexpr (kInput == (C::Input::kStages == 0))
    has_tail = of.template take_tail<kRare, kInput>(n, tiles.lo);
  if constexpr (!Consumer::kOneStep) of.template first_step<kRare, kInput>(n--, has_tail);
  if constexpr (Consumer::kOneStep) {
#pragma unroll 1
    for (bool first = true; n >= tiles.lo; --n, first = false)
      of.template step<true, kRare, kInput>(n, first);
  } else if constexpr (Consumer::Score::kGeneral || C::kListed || kRare) {  // one loop: long steps, or a list
    for (; n >= tiles.lo; --n) of.template step<true, kRare, kInput>(n);
  } else {
    const int32_t lo = max(tiles.lo, of.whole.lo);
#pragma unroll 1
    for (int32_t end = max(tiles.lo, of.whole.hi); n >= tiles.lo; end = tiles.lo) {
      for (; n >= end; --n) of.template step<true, false, kInput>(n);
      for (; n >= lo; --n) of.template step<false, false, kInput>(n);
    }
  }
  if constexpr (!C::kQueryInRegisters) of.shared.q_pipe[of.q_slot()].release(of.tile_index);
  of.template multiply_values<C::kN, true>();
}

// Attends to all visible key tiles of a consumer, from the last to the first. Only tiles in which some row
// does not see all keys are masked. There is at least one tile.
template <class Consumer>
__device__ __forceinline__ void attend_to_ranges(Consumer& of) {
  using C = typename Consumer::Config;
  const auto& tile = *of.tile;
  const auto& keys = tile.keys[of.consumer];
  if constexpr (C::kQueryInRegisters) of.load_query();
  int32_t n = uniform(keys.tiles.hi) - 1;
  // At d64 the tail gains up to 3 %; at d128 it would lose up to 5 %.
  const bool has_tail = of.template take_tail<false, true>(n, uniform(keys.tiles.lo));
  // Up to d 128 this test gains nothing.
  const bool sees_all = C::kHeadDim > 128 && (uniform(keys.whole).contains(n) ||
                                              uniform(tile.first_whole[of.consumer]).contains(n));
  of.template first_step<false, true>(n--, has_tail, !sees_all);
#pragma unroll 1
  while (n >= uniform(keys.tiles.lo)) {  // masked tiles down to `end`, then whole tiles down to `lo`
    const int32_t first = uniform(keys.tiles.lo);
    Interval whole = uniform(keys.whole);
    if (whole.lo > n || whole.empty()) whole = uniform(tile.first_whole[of.consumer]);
    if (whole.lo > n || whole.empty()) whole = {first, first};
    const int32_t lo = max(first, whole.lo), end = max(first, whole.hi);
    for (; n >= end; --n) of.template step<true, false, true>(n);
    for (; n >= lo; --n) of.template step<false, false, true>(n);
  }
  if constexpr (!C::kQueryInRegisters) of.shared.q_pipe[of.consumer].release(of.tile_index);
  of.template multiply_values<C::kN, true>();
}

}  // namespace jax_flash
