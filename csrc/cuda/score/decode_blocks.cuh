// Block masks and boolean masks in decode, whose rows belong to several heads: S ← −inf where a row does not
// see the key.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/visible/blocks.h"
#include "cuda/ptx/barrier.cuh"
#include "cuda/score/blocks.cuh"
#include "cuda/score/draft.cuh"

namespace jax_flash {

// S of the keys from `column` of the mask on ← −inf where row `row` of head 0, which all rows of S share,
// does not show the key. Each lane loads the elements of every 32nd key.
template <class S>
__device__ __forceinline__ void hide_keys_from_all_rows(S& s, const BlockMask& mask, int32_t row,
                                                        int32_t column) {
  constexpr int kWords = (S::kColumns + 31) / 32;
  const int32_t lane = ptx::thread_index() % 32;
  uint32_t seen[kWords];
#pragma unroll
  for (int word = 0; word < kWords; ++word)
    seen[word] = __ballot_sync(~0u, mask.sees_block(0, row, column + 32 * word + lane)) >> S::column(0);
#pragma unroll
  for (int n = 0; n < S::kColumnTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int step = S::column_step(n, e);  // S::column(0) + step % 8 < 8, so both are in one word
      if (seen[step / 32] >> step % 32 & 1) continue;
#pragma unroll
      for (int slot = 0; slot < S::kSlots; ++slot) s.at(slot, n, e) = -INFINITY;
    }
  }
}

// The warp's S ← −inf where the mask does not show the key. Tile has block_mask(); head(slot) and
// block_of_row(mask, slot), the head and the row of the mask of the slot's row; shares_blocks(mask), whether
// these are the same for all rows; band(), key and position(slot).
template <class S, class Tile>
__device__ __forceinline__ void hide_outside_blocks(S& s, const Tile& tile) {
  const BlockMask mask = tile.block_mask();
  const int32_t first = tile.key + mask.first_key;
  const auto sees = [&](int slot, int32_t column) {
    return mask.sees_block(tile.head(slot), tile.block_of_row(mask, slot), column);
  };
  if (mask.block_keys > 1) return hide_blocks(s, first, mask.block_keys, sees);
  if (tile.shares_blocks(mask)) return hide_keys_from_all_rows(s, mask, tile.block_of_row(mask, 0), first);
  constexpr int kLoads = 4;  // at a time
  hide_where<kLoads>(
      s, tile.band(), tile.key, [&](int slot) { return tile.position(slot); },
      [&](int slot, int32_t, int32_t j) { return !sees(slot, j + mask.first_key); });
}

}  // namespace jax_flash
