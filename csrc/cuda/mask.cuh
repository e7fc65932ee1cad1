// The band's mask on a tile of scores.
#pragma once

#include <cmath>

#include "core/band.h"
#include "cuda/ptx/math.cuh"

namespace jax_flash {

// S [rows from `row`, keys from `key`]: −inf outside the band.
template <class S>
__device__ __forceinline__ void mask(S& s, const Band& band, int32_t row, int32_t key) {
#pragma unroll
  for (int slot = 0; slot < S::kSlots; ++slot) {
    const int32_t i = row + S::row(slot);
    const int32_t first = band.first_key(i) - key, last = band.last_key(i) - key;
#pragma unroll
    for (int n = 0; n < S::kColumnTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int32_t j = S::column(n) + e;
        if (j < first || j >= last) s.at(slot, n, e) = -INFINITY;
      }
    }
  }
}

}  // namespace jax_flash
