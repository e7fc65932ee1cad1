// The steps of a backward over key tiles: the query tiles of every query head of a KV head.
#pragma once

#include <cstdint>

#include "core/band.h"

namespace jax_flash {

struct QueryStep {
  int32_t head;  // within the group of the KV head
  int32_t tile;
  int32_t number = 0;  // of the step

  // Down from the last query tile of a head: `number` steps were before.
  __device__ __forceinline__ static QueryStep last(const Interval& tiles, uint32_t number) {
    return {0, tiles.hi - 1, static_cast<int32_t>(number)};
  }
  __device__ __forceinline__ void descend(const Interval& tiles) {
    ++number;
    if (--tile < tiles.lo) tile = tiles.hi - 1, ++head;
  }
  __device__ __forceinline__ void advance(const Interval& tiles) {
    ++number;
    if (++tile == tiles.hi) tile = tiles.lo, ++head;
  }
};

}  // namespace jax_flash
