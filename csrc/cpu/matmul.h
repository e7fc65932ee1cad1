// What streams keys and values without packing them.
#pragma once

#include "isa.h"
// isa.h goes first: it makes the core force-inlined.
#include "convert.h"
#include "rows.h"

namespace jax_flash::JF_ISA {

// to[count, padded(width)] = factor * the n rows at these addresses, then rows of zeros.
static void gather_rows(const char* const* at, int32_t n, int32_t count, const Rows& rows, float factor,
                        float* to) {
  const int32_t ld = padded(rows.width);
  const int32_t bytes = rows.width * static_cast<int32_t>(size_of(rows.dtype));
  // Rows of other heads and pages lie in between, which no hardware prefetcher sees through.
  const int32_t ahead = bytes > 1024 ? 8 : 16;
  for (int32_t r = 0; r < count; ++r, to += ld) {
    if (r + ahead < n && at[r + ahead]) {
      for (int32_t c = 0; c < bytes; c += 64) __builtin_prefetch(at[r + ahead] + c);
    }
    if (r >= n) {
      fill(to, ld, 0.0f);
    } else if (!at[r]) {
      fill(to, ld, rows.missing);
    } else {
      load_row(rows.dtype, at[r], rows.width, factor, to, ld);
    }
  }
}

// Sums of the lanes of each of kLanes vectors.
template <int kStep = kLanes / 2, int... lane>
JF_INLINE Float sum_lanes(Float (&x)[kLanes], std::integer_sequence<int, lane...> lanes) {
#pragma GCC unroll 8
  for (int i = 0; i < kStep; ++i) {
    const Float a = x[i], b = x[i + kStep];
    x[i] = __builtin_shufflevector(a, b, (lane & kStep ? kLanes + lane - kStep : lane)...) +
           __builtin_shufflevector(a, b, (lane & kStep ? kLanes + lane : lane + kStep)...);
  }
  if constexpr (kStep > 1) return sum_lanes<kStep / 2>(x, lanes);
  return x[0];
}

}  // namespace jax_flash::JF_ISA
