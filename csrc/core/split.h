// Attention over parts of the keys, and the merge of the parts. Every backend uses these equations. The sizes
// of parts here are the CPU's; those of CUDA are in core/families.
#pragma once

#include <cmath>
#include <cstdint>

#include "band.h"
#include "views.h"

namespace jax_flash {

inline constexpr int32_t kMaxSplits = 256;        // limits the memory for partial outputs
inline constexpr int32_t kInvariantSplit = 1024;  // keys per part with batch_invariant

// The keys of part `index` of `count`; empty if there are fewer keys than parts.
JF_HD Interval split_part(Interval keys, int32_t index, int32_t count) {
  const int64_t size = ceil_div(keys.size(), count);
  const int64_t lo = keys.lo + index * size, hi = lo + size;
  return {static_cast<int32_t>(lo < keys.hi ? lo : keys.hi),
          static_cast<int32_t>(hi < keys.hi ? hi : keys.hi)};
}

// The number of parts if the spec requests `count`. It depends only on the keys.
JF_HD int32_t clamp_splits(int64_t count, Interval keys) {
  const int64_t most = keys.size() < kMaxSplits ? keys.size() : kMaxSplits;
  return static_cast<int32_t>(count < 1 || most < 1 ? 1 : count < most ? count : most);
}

// Online softmax of one row over one part of the keys: m = max s, l = Σ exp(unit (s − m)), o = Σ exp(unit
// (s − m)) v; without a visible key m = −inf and l = 0. `unit` is the softmax scale if s does not include
// it, else 1. Merging two parts gives the maximum m of both, and (l, o) = first · (l, o) of the first part +
// second · (l, o) of the second. A sink is one more part, with l = 1 and o = 0, that is merged once, at the
// end.
struct SplitMerge {
  float m, first, second;
};

JF_HD SplitMerge merge_splits(float m_first, float m_second, float unit) {
  const float m = m_first > m_second ? m_first : m_second;
  const float zero = m == -INFINITY ? 0.0f : m;  // neither part has a visible key: exp(−inf − 0) = 0
  return {m, expf((m_first - zero) * unit), expf((m_second - zero) * unit)};
}

}  // namespace jax_flash
