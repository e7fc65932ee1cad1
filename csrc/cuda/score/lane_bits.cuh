// Bits for the elements that a lane holds of one row of scores, in ascending order of columns. A lane has two
// of eight columns.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/band.h"
#include "cuda/ptx/math.cuh"

namespace jax_flash {

// Where keys are, counted from `first` on, the lane's first column; 0 for those before it. Limits may be any
// numbers.
__device__ __forceinline__ Interval columns_from(int32_t first, const Interval& keys) {
  return {max(keys.lo, first) - first, max(keys.hi, first) - first};
}

// How many of the lane's elements are in columns before `column`.
__device__ __forceinline__ uint32_t elements_before(int32_t column) {
  const auto x = static_cast<uint32_t>(column);
  return x / 8 * 2 + min(x % 8, 2u);
}

// The bits of the lane's elements in an interval of columns.
__device__ __forceinline__ uint32_t bits_of_columns(const Interval& of) {
  return ptx::shift_left(~0u, elements_before(of.lo)) & ~ptx::shift_left(~0u, elements_before(of.hi));
}

// The bits of all elements of a row of S.
template <class S>
inline constexpr uint32_t kAllElements = ~0u >> (32 - 2 * S::kColumnTiles);

// Whether all elements of a warp's rows are seen; `seen` has a word for each slot. The vote tells the
// compiler that the answer is uniform.
template <class S, int kSlots>
__device__ __forceinline__ bool all_seen(const uint32_t (&seen)[kSlots]) {
  static_assert(S::kSlots == kSlots && S::kColumnTiles <= 16);
  bool all = true;
#pragma unroll
  for (uint32_t own : seen) all &= (own & kAllElements<S>) == kAllElements<S>;
  return __all_sync(~0u, all);
}

// S ← −inf where a bit is 0.
template <class S, int kSlots>
__device__ __forceinline__ void hide_unless_seen(S& s, const uint32_t (&seen)[kSlots]) {
  if (all_seen<S>(seen)) return;
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
#pragma unroll
    for (int n = 0; n < S::kColumnTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (!(seen[slot] >> (2 * n + e) & 1)) s.at(slot, n, e) = -INFINITY;
    }
  }
}

}  // namespace jax_flash
