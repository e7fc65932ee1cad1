// The band's mask on a tile of scores.
#pragma once

#include <cmath>

#include "core/band.h"
#include "cuda/ptx/math.cuh"

namespace jax_flash {

// S [rows from `row`, keys from `key`]: −inf outside the band. Only where the band begins, or ends, within
// the tile need it be asked for.
template <class S>
__device__ __forceinline__ void mask(S& s, const Band& band, int32_t row, int32_t key, bool begins = true,
                                     bool ends = true) {
  auto hide = [&](auto bound, auto hidden) {
#pragma unroll
    for (int slot = 0; slot < S::kSlots; ++slot) {
      const int32_t limit = bound(row + S::row(slot)) - key - S::column(0);
#pragma unroll
      for (int n = 0; n < S::kColumnTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (hidden(S::column_step(n) + e, limit)) s.at(slot, n, e) = -INFINITY;
        }
      }
    }
  };
  if (begins)
    hide([&](int32_t i) { return band.first_key(i); }, [](int j, int32_t limit) { return j < limit; });
  if (ends)
    hide([&](int32_t i) { return band.last_key(i); }, [](int j, int32_t limit) { return j >= limit; });
}

}  // namespace jax_flash
