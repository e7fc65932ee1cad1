// Keys whose values are not finite. A row that may not see such a key has a weight of 0 for it, but 0 · NaN
// is NaN. So the products take zeros instead of these values, and a second step adds the values to the rows
// that see the key. All of this runs only if a product gave NaN.
#pragma once

#include "isa.h"
// isa.h goes first: it makes the core force-inlined.
#include "head.h"
#include "scores.h"

namespace jax_flash::JF_ISA {

JF_INLINE bool any_lane(Int mask) {
  int32_t any = 0;
  for (int lane = 0; lane < kLanes; ++lane) any |= mask[lane];
  return any != 0;
}

// Whether one of n floats is NaN; n is a multiple of kLanes.
JF_INLINE bool has_nan(const float* x, int32_t n) {
  Int nan{};
  for (int32_t c = 0; c < n; c += kLanes) nan |= load(x + c) != load(x + c);
  return any_lane(nan);
}

// Whether a packed operand of n words, a multiple of kLanes, has an element that is not finite: adding 1 to
// an exponent of ones carries into the sign.
template <class E>
JF_INLINE bool has_non_finite(const Word* x, int64_t n) {
  constexpr uint32_t kExponent = E::kPair == 1 ? 0x7F800000u : 0x7F807F80u;
  constexpr uint32_t kOne = E::kPair == 1 ? 0x00800000u : 0x00800080u;
  UInt sum{};
  for (int64_t c = 0; c < n; c += kLanes) sum |= (load_words(x + c) & kExponent) + kOne;
  return any_lane(reinterpret_cast<Int>(sum & (kExponent + kOne)));
}

// Whether all elements of a row are finite.
static bool is_finite_row(DType dtype, const char* row, int32_t width) {
  alignas(64) float x[kMaxLatentDim + kLanes];
  const int32_t n = round_up(width, kLanes);
  load_row(dtype, row, width, 1.0f, x, n);
  for (int32_t c = 0; c < n; c += kLanes) store(x + c, load(x + c) - load(x + c));
  return !has_nan(x, n);
}

// Whether a row sees a key: docs/architecture.md, the equations.
static bool sees(const Head& head, Row row, int32_t j) {
  const Problem& p = head.problem;
  const int32_t i = row.position, z = head.sequence.index;
  const auto segment = [&](const View& ids, int32_t at) {
    return *reinterpret_cast<const int32_t*>(element(head, ids, ids.offset(z, 0, at), 4));
  };
  if (!head.seen(row, {0, head.band.k_len}).contains(j)) return false;
  if (p.q_segment_ids && segment(p.q_segment_ids, i) != segment(p.kv_segment_ids, j)) return false;
  if (head.mask && head.mask.hides(row.head - head.head, i, j)) return false;
  if (head.blocks && !head.blocks.sees(row.head - head.head, i, j)) return false;
  if (!p.bias) return true;
  const int64_t at = p.bias.offset(z, row.head, i, j);
  return shared_bias(p.bias_dtype, element(head, p.bias, at, size_of(p.bias_dtype))) != kNegInf;
}

// The columns of those keys of a tile for which the products take zeros.
struct NonFiniteKeys {
  int32_t count = 0;
  int32_t column[kTileN];

  // Finds such keys among the n keys of the tile that begins at key j0, and sets their addresses in `at` to
  // null. values_of(x): the values at KV head x of `heads`.
  template <class ValuesOf>
  void find(int32_t heads, ValuesOf values_of, int32_t j0, int32_t n, const char** at) {
    count = 0;
    for (int32_t c = 0; c < n; ++c) {
      bool bad = false;
      for (int32_t x = 0; x < heads && at[c]; ++x) bad |= has_non_finite_values(values_of(x), j0 + c);
      if (!bad) continue;
      at[c] = nullptr;
      column[count++] = c;
    }
  }

  static float factor_of(const Rows& rows, int32_t j) {
    float factor = rows.factor;
    if (rows.page_factors) rows.factors(j, 1, &factor);
    return factor;
  }

 private:
  // Whether a key's values, or their scale in a float8 pool, are not all finite.
  static bool has_non_finite_values(const Rows& rows, int32_t j) {
    const float factor = factor_of(rows, j);
    const char* at;
    rows.addresses(j, 1, &at);
    return factor - factor != 0.0f || !is_finite_row(rows.dtype, at, rows.width);
  }
};

// The weight of column c in a row of P, as softmax_row() stores it.
template <class E>
JF_INLINE float weight_of(const float* p, int32_t c) {
  if constexpr (E::kPair == 1) return p[c];
  const Word word = reinterpret_cast<const Word*>(p)[c / 2];
  return __builtin_bit_cast(float, c % 2 ? word & 0xFFFF0000u : word << 16);
}

// O += P V over the non-finite keys of a tile that begins at key j0, for each row that sees them. row_of(r):
// the Row; values_of(r): the values at its KV head. The row stride of P is p_row floats, that of O `ld`.
template <class E, class RowOf, class ValuesOf>
static void add_non_finite_keys(const Head& head, const NonFiniteKeys& non_finite, int32_t j0, int32_t rows,
                                RowOf row_of, ValuesOf values_of, const float* p, int32_t p_row, float* o,
                                int32_t ld) {
  alignas(64) float x[kMaxLatentDim + kPanel];
  for (int32_t k = 0; k < non_finite.count; ++k) {
    const int32_t c = non_finite.column[k];
    for (int32_t r = 0; r < rows; ++r) {
      if (!sees(head, row_of(r), j0 + c)) continue;
      const Rows values = values_of(r);
      const char* at;
      values.addresses(j0 + c, 1, &at);
      load_row(values.dtype, at, values.width, NonFiniteKeys::factor_of(values, j0 + c), x, ld);
      const float weight = weight_of<E>(p + r * p_row, c);
      for (int32_t i = 0; i < ld; i += kLanes)
        store(o + r * ld + i, load(o + r * ld + i) + load(x + i) * weight);
    }
  }
}

}  // namespace jax_flash::JF_ISA
