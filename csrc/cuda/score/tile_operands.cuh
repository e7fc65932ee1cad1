// The score operands of portable kernels that skip the tiles hidden by block masks or a boolean mask.
#pragma once

#include <cstdint>

#include "core/plan/launch_plan.h"
#include "cuda/score/operands.cuh"
#include "cuda/work.cuh"

namespace jax_flash {

struct TileOperands : ScoreOperands {
  MaskTiles shown;  // the tiles of a boolean mask from the operands' head on; none if they are not classified

  // Selects the mask's tiles of work.head.
  __device__ __forceinline__ void prepare_tiles(const GridTiles& grid, const BlockWork& work) {
    shown = grid.mask.seen ? grid.mask.at(work.leading, work.tile.index, work.head) : MaskTiles{};
  }
  // Selects the tiles of the head `further` heads after this one, or before it if negative.
  __device__ __forceinline__ void move_tiles(int32_t further) { shown.seen += further * shown.head; }

  // Whether tiles may be hidden.
  __device__ __forceinline__ bool skips(const Problem& p) const { return p.block_mask || shown.seen; }
  // Whether masks hide all of `keys` from all of `rows`, which are in use, at the head `further` heads after
  // this one.
  __device__ __forceinline__ bool hides(const Problem& p, int32_t further, const Interval& rows,
                                        const Interval& keys) const {
    return blocks_hide(p, further, rows, keys) ||
           (shown.seen && shown.seen_of(further, rows, keys) == SeenPiece::kNone);
  }
  // Whether the boolean mask is known to show all of the tile that this row and key, which are in use, lie
  // in.
  __device__ __forceinline__ bool shows_all(int32_t row, int32_t key) const {
    return shown.seen && shown.seen_of_tile(0, row / kRowBlock, key / kRowBlock) == SeenPiece::kAll;
  }
};

// The first of `tiles` from tile n on that masks do not hide from a query tile; tiles.hi if there is none.
// All lanes of a warp call it. N: keys of a tile.
template <int N>
__device__ __forceinline__ int32_t next_shown(const Problem& p, const TileOperands& score,
                                              const TileWork& tile, const Interval& tiles, int32_t n) {
  if (!score.skips(p)) return n;
  const Interval rows{tile.row, tile.used_queries()};
  for (; n < tiles.hi; n += 32) {
    const int32_t own = n + static_cast<int32_t>(threadIdx.x % 32), key = own * N;
    const bool shown = own < tiles.hi && !score.hides(p, 0, rows, {key, min(key + N, tile.k_len)});
    const uint32_t all = __ballot_sync(~0u, shown);
    if (all) return n + __ffs(static_cast<int>(all)) - 1;
  }
  return tiles.hi;
}

// The function by which a kernel finds its tiles: from(n) is the first tile from n on that masks and ranges
// leave to the query tile of `block`, a BlockState or like it; without C::kSkips it is n.
template <class C, class Block>
__device__ __forceinline__ auto shown_from(const Problem& p, const Block& block) {
  return [&](int32_t n) {
    if constexpr (C::kSkips)
      n = next_shown<C::kN>(p, block.score, block.work.tile, block.tiles, block.from(n));
    return n;
  };
}

// Leaves out the first of block.tiles until one is shown. All threads of the CTA call it.
template <class C, class Block>
__device__ __forceinline__ void begin_at_shown(const Problem& p, Block& block) {
  if constexpr (C::kSkips) {
    const int32_t first = shown_from<C>(p, block)(block.tiles.lo);
    __syncthreads();  // every thread has read the tiles
    if (threadIdx.x == 0) block.tiles.lo = first;
    __syncthreads();
  }
}

}  // namespace jax_flash
