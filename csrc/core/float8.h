// The two float8 formats of page pools. float8_e4m3fn: 4 exponent bits (bias 7), 3 mantissa bits; no
// infinities, NaN is 0x7F. float8_e5m2: 5 exponent bits (bias 15), 2 mantissa bits, the upper byte of a
// float16. The conversions are branch-free, so that loops over them vectorise.
#pragma once

#include <cstdint>
#include <cstring>

#include "spec.h"

namespace jax_flash {

// Constants of a format; a uint32_t holds the bits of a float32.
template <DType kFormat>
struct Float8;
template <>
struct Float8<DType::kF8E4M3> {
  static constexpr int kShift = 20;                   // mantissa bits of float32 minus those of the format
  static constexpr uint32_t kRebias = 0x3C000000u;    // the difference of the exponents' biases
  static constexpr uint32_t kSmallest = 0x3C800000u;  // the smallest normal number, 2^-6
  static constexpr float kDenormalUnit = 16384.0f;    // its last bit is worth one step of the denormals, 2^-9
  static constexpr uint32_t kLargest = 0x43E00000u;   // 448
  static constexpr uint8_t kLargestBits = 0x7E;
  static constexpr uint32_t kSpecial = 0x07F00000u;  // after the shift, numbers from here on stand for NaN
  static constexpr uint32_t kSpecialRebias = 0x78000000u;
};
template <>
struct Float8<DType::kF8E5M2> {
  static constexpr int kShift = 21;
  static constexpr uint32_t kRebias = 0x38000000u;
  static constexpr uint32_t kSmallest = 0x38800000u;  // 2^-14
  static constexpr float kDenormalUnit = 128.0f;      // 2^-16
  static constexpr uint32_t kLargest = 0x47600000u;   // 57344
  static constexpr uint8_t kLargestBits = 0x7B;
  static constexpr uint32_t kSpecial = 0x0F800000u;  // after the shift: infinity, then NaN
  static constexpr uint32_t kSpecialRebias = 0x70000000u;
};

JF_HD uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

JF_HD float float_of_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

// The value of a denormal is computed as a difference of normal numbers, because threads may flush float32
// denormals to zero.
template <DType kFormat>
JF_HD float float8_to_float(uint8_t x) {
  using F = Float8<kFormat>;
  const uint32_t magnitude = (x & 0x7Fu) << F::kShift;
  const uint32_t denormal = float_bits(float_of_bits(magnitude + F::kSmallest) - float_of_bits(F::kSmallest));
  const uint32_t bits = magnitude < 0x00800000u ? denormal : magnitude + F::kRebias;
  return float_of_bits((magnitude >= F::kSpecial ? magnitude + F::kSpecialRebias : bits) | (x & 0x80u) << 24);
}

// Rounds to nearest, ties to even; saturates at ± the largest number, infinities too; NaN stays NaN.
template <DType kFormat>
JF_HD uint8_t float_to_float8(float x) {
  using F = Float8<kFormat>;
  const uint32_t bits = float_bits(x), sign = bits >> 24 & 0x80u, magnitude = bits & 0x7FFFFFFFu;
  // For results below the smallest normal number, this addition rounds to a multiple of the smallest
  // subnormal.
  const uint32_t denormal =
      float_bits(float_of_bits(magnitude) + F::kDenormalUnit) - float_bits(F::kDenormalUnit);
  constexpr uint32_t kBelowHalf = (1u << (F::kShift - 1)) - 1;
  const uint32_t normal = (magnitude - F::kRebias + kBelowHalf + (magnitude >> F::kShift & 1u)) >> F::kShift;
  uint32_t y = magnitude < F::kSmallest ? denormal : normal;
  y = magnitude > F::kLargest ? F::kLargestBits : y;
  y = magnitude > 0x7F800000u ? 0x7Fu : y;
  return static_cast<uint8_t>(y | sign);
}

// The dynamic scales of append_kv are powers of two (jax_flash/paged/quantise.py). A page whose finite
// numbers are all zero has the smallest scale, 2^kSmallestScale.
inline constexpr int32_t kSmallestScale = -100;

// The smallest scale with largest ≤ scale · the largest number of the format, which is 1.75 · 2^…
JF_HD float page_scale(float largest, DType format) {
  const int32_t largest_exponent = format == DType::kF8E5M2 ? 15 : 8;
  const auto rounded_up = static_cast<int32_t>((float_bits(largest) + 0x1FFFFFu) >> 23);
  const int32_t exponent = rounded_up - largest_exponent, least = 127 + kSmallestScale;
  return float_of_bits(static_cast<uint32_t>(exponent < least ? least : exponent) << 23);
}

// The scale of a page when elements up to `largest` are written from slot `first` on. Writing slot 0 resets a
// page; afterwards its scale only grows. `before`: the old scale, or 0 if no stored element is kept.
struct PageScale {
  float before, after;
  JF_HD PageScale(float stored, int32_t first, float largest, DType format) {
    const bool kept = first > 0 && stored > 0 && float_bits(stored) < 0x7F800000u;
    const float needed = page_scale(largest, format);
    before = kept ? stored : 0;
    after = before > needed ? before : needed;
  }
  // The factor for elements that are already stored, in slots before the first one.
  JF_HD float factor() const { return before / after; }
};

JF_HD float float8_to_float(uint8_t x, DType format) {
  return format == DType::kF8E5M2 ? float8_to_float<DType::kF8E5M2>(x) : float8_to_float<DType::kF8E4M3>(x);
}
JF_HD uint8_t float_to_float8(float x, DType format) {
  return format == DType::kF8E5M2 ? float_to_float8<DType::kF8E5M2>(x) : float_to_float8<DType::kF8E4M3>(x);
}

}  // namespace jax_flash
