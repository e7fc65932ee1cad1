// The operand `block_mask`: S ← −inf where the row's block does not see that of the key.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/visible/blocks.h"

namespace jax_flash {

// S [rows from `row`, keys from `key`] ← −inf where the blocks do not show the key.
template <class S>
__device__ __forceinline__ void hide_outside_blocks(S& s, const BlockMask& blocks, int32_t row, int32_t key) {
  int32_t rows[S::kSlots];
#pragma unroll
  for (int slot = 0; slot < S::kSlots; ++slot)
    rows[slot] = (row + S::row(slot) + blocks.first_row) / blocks.block_rows;
#pragma unroll
  for (int n = 0; n < S::kColumnTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int32_t column = (key + S::column(n, e) + blocks.first_key) / blocks.block_keys;
#pragma unroll
      for (int slot = 0; slot < S::kSlots; ++slot)
        if (!blocks.sees_block(0, rows[slot], column)) s.at(slot, n, e) = -INFINITY;
    }
  }
}

}  // namespace jax_flash
