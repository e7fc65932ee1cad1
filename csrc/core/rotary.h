// Rotary position embedding of one pair of features (Su et al., RoFormer, 2021).
#pragma once

#include <cstdint>

#include "spec.h"

namespace jax_flash {

struct RotaryPair {
  int32_t first, second;  // indices of features
};

// Pair i of `count`: adjacent features if interleaved, else one feature from each half of the rotated ones.
JF_HD RotaryPair rotary_pair(int32_t i, int32_t count, bool interleaved) {
  return interleaved ? RotaryPair{2 * i, 2 * i + 1} : RotaryPair{i, i + count};
}

// (a + ib) ← (a + ib)·exp(iθ)
JF_HD void rotate(float& a, float& b, float cos, float sin) {
  const float new_a = a * cos - b * sin;
  b = b * cos + a * sin;
  a = new_a;
}

// The row of the cos and sin tables for a position, clamped to the last.
JF_HD int32_t rotary_row(int32_t position, int32_t rows) { return position < rows ? position : rows - 1; }

}  // namespace jax_flash
