// The steps of a backward over key tiles: the query tiles of every query head of a KV head.
#pragma once

#include <cstdint>

#include "core/band.h"
#include "core/visible/key_tiles.h"

namespace jax_flash {

// The order of the steps: head after head, or tile after tile.
struct QueryWalk {
  Interval tiles;
  int32_t heads;
  int32_t heads_inner;  // whether all heads of a tile come before the next tile
  int32_t direction;    // 1: from the first tile to the last; −1: from the last to the first

  __device__ __forceinline__ int32_t steps() const { return tiles.size() * heads; }
  __device__ __forceinline__ int32_t first_tile() const { return direction > 0 ? tiles.lo : tiles.hi - 1; }
  // How many tiles of an interval come from `tile`, which is one of them, on.
  __device__ __forceinline__ int32_t tiles_left(const Interval& of, int32_t tile) const {
    return direction > 0 ? of.hi - tile : tile - of.lo + 1;
  }
};

// The same order, without the tiles in a gap.
struct GappedWalk : QueryWalk {
  Interval gap;

  __device__ __forceinline__ int32_t steps() const { return (tiles.size() - gap.size()) * heads; }
  // The tile after `tile`.
  __device__ __forceinline__ int32_t next(int32_t tile) const {
    tile += direction;
    if (!gap.contains(tile)) return tile;
    return direction > 0 ? gap.hi : gap.lo - 1;
  }
};

struct QueryStep {
  int32_t head;  // within the group of the KV head
  int32_t tile;
  int32_t number;  // number of the step

  __device__ __forceinline__ static QueryStep first(const QueryWalk& walk, uint32_t number) {
    return {0, walk.first_tile(), static_cast<int32_t>(number)};
  }
  // Head after head, in ascending order.
  __device__ __forceinline__ void advance(const Interval& tiles) {
    ++number;
    if (++tile == tiles.hi) tile = tiles.lo, ++head;
  }
  __device__ __forceinline__ void advance(const QueryWalk& walk) {
    ++number;
    if (walk.heads_inner) {
      if (++head == walk.heads) head = 0, tile += walk.direction;
    } else {
      tile += walk.direction;
      if (!walk.tiles.contains(tile)) tile = walk.first_tile(), ++head;
    }
  }
  __device__ __forceinline__ void advance(const GappedWalk& walk) {
    ++number;
    if (walk.heads_inner) {
      if (++head == walk.heads) head = 0, tile = walk.next(tile);
    } else {
      tile = walk.next(tile);
      if (!walk.tiles.contains(tile)) tile = walk.first_tile(), ++head;
    }
  }
};

// A walk through a list of steps (core/visible/key_tiles.h), in the list's order. `tiles`: not empty if the
// list has steps.
struct ListedWalk : QueryWalk {
  const int32_t* list;
  int32_t count;

  __device__ __forceinline__ int32_t steps() const { return count; }
};

struct ListedQueryStep : QueryStep {
  int32_t listed = 0;        // the list element of this step
  int32_t next = 0, at = 0;  // the element after it, and that element's index

  __device__ __forceinline__ void take(int32_t element) {
    listed = element, head = ListedStep::head(element), tile = ListedStep::tile(element);
  }
  __device__ __forceinline__ static ListedQueryStep first(const ListedWalk& walk, uint32_t number) {
    ListedQueryStep step{{0, 0, static_cast<int32_t>(number)}};
    if (walk.count == 0) return step;
    step.take(walk.list[0]);
    step.fetch(walk);
    return step;
  }
  // Reads an element one step before it is needed.
  __device__ __forceinline__ void fetch(const ListedWalk& walk) {
    if (++at < walk.count) next = walk.list[at];
  }
  __device__ __forceinline__ void advance(const ListedWalk& walk) {
    ++number;
    take(next);
    fetch(walk);
  }
};

// The first step of a walk. `number`: the number of steps before it.
__device__ __forceinline__ QueryStep first_step(const QueryWalk& walk, uint32_t number) {
  return QueryStep::first(walk, number);
}
__device__ __forceinline__ ListedQueryStep first_step(const ListedWalk& walk, uint32_t number) {
  return ListedQueryStep::first(walk, number);
}

}  // namespace jax_flash
