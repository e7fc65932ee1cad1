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

// Whether every row of a warp's S sees all its keys. Voted, for the compiler to know that the warp agrees.
template <class S>
__device__ __forceinline__ bool all_seen(const S&, const Band& band, int32_t row, int32_t key) {
  const Interval all = band.common(row, row + 8 * S::kSlots);
  return __all_sync(~0u, all.lo <= key && key + 8 * S::kColumnTiles <= all.hi);
}

// S ← 0 where it is not seen: what lies past a length must not choose how the rest is computed.
template <class S>
__device__ __forceinline__ void clear_unseen(S& s, const Band& band, int32_t row, int32_t key) {
#pragma unroll
  for (int slot = 0; slot < S::kSlots; ++slot) {
    const int32_t i = row + S::row(slot), first = key + S::column(0);
    const int32_t lo = band.first_key(i) - first, hi = (i < band.q_len ? band.last_key(i) : 0) - first;
#pragma unroll
    for (int n = 0; n < S::kColumnTiles; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (S::column_step(n) + e < lo || S::column_step(n) + e >= hi) s.at(slot, n, e) = 0;
  }
}

}  // namespace jax_flash
