// Bits for the elements that a lane holds of one row of scores, in ascending order of columns. A lane has two
// of eight columns.
#pragma once

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

}  // namespace jax_flash
