// The loop of cuda/forward/hopper_consumer.cuh for ranges, which leave a gap between the key tiles.
#pragma once

#include <cstdint>

#include "core/band.h"
#include "cuda/hopper/roles.cuh"

namespace jax_flash {

// Attends to all visible key tiles of a consumer except those of the gap, from the last to the first. Only
// tiles in which some row does not see all keys are masked. There is at least one tile.
template <class Consumer>
__device__ __forceinline__ void attend_around_gap(Consumer& of) {
  using C = typename Consumer::Config;
  const auto& tile = *of.tile;
  const auto& keys = tile.keys[of.consumer];
  if constexpr (C::kQuerySteps > 0) of.load_query();
  const Interval tiles = uniform(keys.tiles);
  int32_t n = tiles.hi - 1;
  // Up to d 128 this test gains nothing.
  const bool sees_all = C::kHeadDim > 128 && (uniform(keys.whole).contains(n) ||
                                              uniform(tile.first_whole[of.consumer]).contains(n));
  of.template first_step<false, true>(n, false, !sees_all);
  n = tile.after(n);
#pragma unroll 1
  while (n >= tiles.lo) {  // masked tiles down to `end`, then whole tiles down to `lo`
    const Interval gap = uniform(tile.gap);
    const int32_t first = n >= gap.hi ? max(gap.hi, tiles.lo) : tiles.lo;
    Interval whole = uniform(keys.whole);
    if (whole.lo > n || whole.empty()) whole = uniform(tile.first_whole[of.consumer]);
    if (whole.lo > n || whole.empty()) whole = {first, first};
    const int32_t lo = max(first, whole.lo), end = max(first, whole.hi);
    for (; n >= end; --n) of.template step<true, false, true>(n);
    for (; n >= lo; --n) of.template step<false, false, true>(n);
    if (n < gap.hi && first == gap.hi && !gap.empty()) n = gap.lo - 1;
  }
  if constexpr (!C::kQueryInRegisters) of.shared.q_pipe[of.consumer].release(of.tile_index);
  of.template multiply_values<C::kN, true>();
}

}  // namespace jax_flash
