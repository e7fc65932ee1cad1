// Masks whose elements are read one by one, in the few tiles that they hide in part.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/band.h"

namespace jax_flash {

// S ← −inf where hidden(i, j), which is called only for rows and keys in use. Row i is row_of(slot), and the
// first key is `key`. Few tiles run the loop, and it is not unrolled: its loads would take registers from all
// other tiles.
template <class S, class Row, class Hidden>
__device__ __forceinline__ void hide_where(S& s, const Band& band, int32_t key, Row row_of, Hidden hidden) {
  static_assert(2 * S::kColumnTiles <= 32);
#pragma unroll
  for (int slot = 0; slot < S::kSlots; ++slot) {
    const int32_t i = row_of(slot), end = i < band.q_len ? band.k_len : 0;
    uint32_t found = 0;  // bit 2 n + e
#pragma unroll 1
    for (int at = 0; at < 2 * S::kColumnTiles; ++at) {
      const int32_t j = key + S::column(at / 2, at % 2);
      if (j < end && hidden(i, j)) found |= 1u << at;
    }
#pragma unroll
    for (int n = 0; n < S::kColumnTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (found >> (2 * n + e) & 1) s.at(slot, n, e) = -INFINITY;
    }
  }
}

}  // namespace jax_flash
