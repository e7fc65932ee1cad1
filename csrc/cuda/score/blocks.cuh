// The operand `block_mask`: S ← −inf if the row's block does not see the key's block.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/visible/blocks.h"
#include "cuda/score/elements.cuh"

namespace jax_flash {

// S [rows from `row`, keys from `key`] ← −inf where the blocks do not show the key. The loop over blocks of
// keys is not unrolled, which takes the fewest registers.
template <class S>
__device__ __forceinline__ void hide_outside_blocks(S& s, const BlockMask& blocks, const Band& band,
                                                    int32_t row, int32_t key) {
  if (blocks.block_keys == 1) {
    hide_where(
        s, band, key, [row](int slot) { return row + S::row(slot); },
        [&](int32_t i, int32_t j) { return !blocks.sees(0, i, j); });
    return;
  }
  const int32_t first = key + blocks.first_key, last = (first + S::kColumns - 1) / blocks.block_keys;
#pragma unroll 1
  for (int32_t column = first / blocks.block_keys; column <= last; ++column) {
    const int32_t lo = column * blocks.block_keys - first - S::column(0);
#pragma unroll
    for (int slot = 0; slot < S::kSlots; ++slot) {
      if (blocks.sees_block(0, (row + S::row(slot) + blocks.first_row) / blocks.block_rows, column)) continue;
#pragma unroll
      for (int n = 0; n < S::kColumnTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int step = S::column_step(n, e) - lo;
          if (0 <= step && step < blocks.block_keys) s.at(slot, n, e) = -INFINITY;
        }
      }
    }
  }
}

}  // namespace jax_flash
