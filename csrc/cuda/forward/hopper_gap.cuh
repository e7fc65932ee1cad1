// The loop of cuda/forward/hopper_consumer.cuh for ranges.
#pragma once

#include <cstdint>

#include "core/band.h"
#include "cuda/hopper/roles.cuh"

namespace jax_flash {

// Attends to all visible key tiles of a consumer, from the last to the first. Only tiles in which some row
// does not see all keys are masked. There is at least one tile. Only half of the first tile is multiplied if
// the consumer sees no other keys of it.
template <class Consumer>
__device__ __forceinline__ void attend_in_ranges(Consumer& of) {
  using C = typename Consumer::Config;
  constexpr int kHalf = C::kHalfKeys;
  const auto& tile = *of.tile;
  const auto& keys = tile.keys[of.consumer];
  const Interval tiles = uniform(keys.tiles);
  int32_t n = tiles.hi - 1;
  typename Consumer::Score score;
  const bool partial =
      !uniform(keys.whole).contains(n) && !uniform(tile.first_whole[of.consumer]).contains(n);
  if (C::kEarlyLimits && partial) score.load_limits(of.score_tile(of.kv_index));
  if constexpr (C::kQuerySteps > 0) of.load_query();
  bool has_tail = false;
  if constexpr (kHalf > 0) {
    has_tail = n > tiles.lo && uniform(keys.end) - n * C::kN <= kHalf;
    if (has_tail) {
      of.template first_step<false, true, kHalf>(n--, false, score, partial);
      of.template step<true, false, true, C::kN, kHalf>(n);
    }
  }
  if (!has_tail) of.template first_step<false, true>(n, false, score, partial);
  const bool has_half = kHalf > 0 && n > tiles.lo && uniform(tile.half[of.consumer]) >= 0;
  const int32_t last = tiles.lo + has_half;
  --n;
#pragma unroll 1
  while (n >= last) {  // masked tiles down to `end`, then whole tiles down to `lo`
    Interval whole = uniform(keys.whole);
    if (whole.lo > n || whole.empty()) whole = uniform(tile.first_whole[of.consumer]);
    if (whole.lo > n || whole.empty()) whole = {last, last};
    const int32_t lo = max(last, whole.lo), end = max(last, whole.hi);
    for (; n >= end; --n) of.template step<true, false, true>(n);
    for (; n >= lo; --n) of.template step<false, false, true>(n);
  }
  if constexpr (kHalf > 0) {
    if (has_half) {
      const int32_t from = uniform(tile.half[of.consumer]);
      of.template step<true, false, true, kHalf>(n, from);
      if constexpr (!C::kQueryInRegisters) of.shared.q_pipe[of.consumer].release(of.tile_index);
      return of.template multiply_values<kHalf, true>(from);
    }
  }
  if constexpr (!C::kQueryInRegisters) of.shared.q_pipe[of.consumer].release(of.tile_index);
  of.template multiply_values<C::kN, true>();
}

}  // namespace jax_flash
