// Attention over parts of the keys, and what joins the parts: the same on every backend.
#pragma once

#include <cmath>
#include <cstdint>

#include "band.h"
#include "views.h"

namespace jax_flash {

inline constexpr int32_t kMaxSplits = 256;        // bounds the memory of the parts
inline constexpr int32_t kInvariantSplit = 1024;  // keys of a part in batch-invariant mode

// Part `index` of `count` of the keys; empty where there are too few.
JF_HD Interval split_part(Interval keys, int32_t index, int32_t count) {
  const int64_t size = ceil_div(keys.size(), count);
  const int64_t lo = keys.lo + index * size, hi = lo + size;
  return {static_cast<int32_t>(lo < keys.hi ? lo : keys.hi),
          static_cast<int32_t>(hi < keys.hi ? hi : keys.hi)};
}

// The number of parts where the spec decides it: depends on the keys alone.
JF_HD int32_t clamp_splits(int64_t count, Interval keys) {
  const int64_t most = keys.size() < kMaxSplits ? keys.size() : kMaxSplits;
  return static_cast<int32_t>(count < 1 || most < 1 ? 1 : count < most ? count : most);
}

// A part's softmax of one row is m, the maximum of its scores, l = Σ exp(unit (s - m)) and, beside it,
// o = Σ exp(unit (s - m)) v; without a visible key m = -inf, l = 0. `unit` is the scale where scores are kept
// without it. These are the factors of (l, o) of two parts in their union, whose maximum is m. A sink is one
// more part, with l = 1 and no o, that joins once at the end.
struct SplitMerge {
  float m, first, second;
};

JF_HD SplitMerge merge_splits(float m_first, float m_second, float unit) {
  const float m = m_first > m_second ? m_first : m_second;
  const float zero = m == -INFINITY ? 0.0f : m;  // neither part has a key: exp(-inf - 0) = 0
  return {m, expf((m_first - zero) * unit), expf((m_second - zero) * unit)};
}

}  // namespace jax_flash
