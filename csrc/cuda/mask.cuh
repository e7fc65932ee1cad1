// The band's mask on a tile of scores.
#pragma once

#include <cmath>

#include "core/band.h"
#include "cuda/ptx/math.cuh"

namespace jax_flash {

// S [.., keys from `key`] ← value if hidden(key, limit), with limit = bound(slot).
template <class S, class Bound, class Hidden>
__device__ __forceinline__ void hide(S& s, int32_t key, float value, Bound bound, Hidden hidden) {
#pragma unroll
  for (int slot = 0; slot < S::kSlots; ++slot) {
    const int32_t limit = bound(slot) - key - S::column(0);
#pragma unroll
    for (int n = 0; n < S::kColumnTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (hidden(S::column_step(n, e), limit)) s.at(slot, n, e) = value;
      }
    }
  }
}

// The columns that are hidden: those before the limit, or those from the limit on.
struct BeforeLimit {
  __device__ __forceinline__ bool operator()(int32_t column, int32_t limit) const { return column < limit; }
};
struct FromLimit {
  __device__ __forceinline__ bool operator()(int32_t column, int32_t limit) const { return column >= limit; }
};

// S ← value outside the band, for a transposed S. The band of each key limits the rows, because a lane has
// fewer keys than rows.
template <class S>
__device__ __forceinline__ void mask_transposed(S& s, const Band& band, int32_t row, int32_t key,
                                                float value = -INFINITY) {
  const auto hide_rows = [&](auto bound, auto hidden) {
#pragma unroll
    for (int n = 0; n < S::kColumnTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int32_t j = key + S::column(n, e), limit = bound(band.queries(j, j + 1)) - row - S::row(0);
#pragma unroll
        for (int slot = 0; slot < S::kSlots; ++slot)
          if (hidden(S::row_step(slot), limit)) s.at(slot, n, e) = value;
      }
    }
  };
  hide_rows([](Interval seen) { return seen.lo; }, BeforeLimit{});
  hide_rows([](Interval seen) { return seen.hi; }, FromLimit{});
}

// S ← −inf outside the band. `begins`, `ends`: whether some row's band begins, or ends, within the tile.
template <class S>
__device__ __forceinline__ void mask(S& s, const Band& band, int32_t row, int32_t key, bool begins = true,
                                     bool ends = true) {
  if constexpr (S::kTransposed) return mask_transposed(s, band, row, key);
  if (begins)
    hide(s, key, -INFINITY, [&](int slot) { return band.first_key(row + S::row(slot)); }, BeforeLimit{});
  if (ends) hide(s, key, -INFINITY, [&](int slot) { return band.last_key(row + S::row(slot)); }, FromLimit{});
}

// Whether every row of a warp's S sees all keys. The vote tells the compiler that the branch is uniform.
template <class S>
__device__ __forceinline__ bool all_seen(const S&, const Band& band, int32_t row, int32_t key) {
  const Interval all = band.common(row, row + S::kRows);
  return __all_sync(~0u, all.lo <= key && key + S::kColumns <= all.hi);
}

// S ← 0 where it is hidden, and in rows past the sequence. Hidden scores may have any value, which must not
// decide how visible ones are computed.
template <class S>
__device__ __forceinline__ void clear_unseen(S& s, const Band& band, int32_t row, int32_t key) {
  hide(s, key, 0, [&](int slot) { return band.first_key(row + S::row(slot)); }, BeforeLimit{});
  const auto end = [&](int32_t i) { return i < band.q_len ? band.last_key(i) : 0; };
  hide(s, key, 0, [&](int slot) { return end(row + S::row(slot)); }, FromLimit{});
}

}  // namespace jax_flash
