// float8_e4m3fn: 1 sign bit, 4 exponent bits (bias 7), 3 mantissa bits; no infinities, NaN is 0x7F. The
// conversions are branch-free, so that loops over them vectorise.
#pragma once

#include <cstdint>
#include <cstring>

#include "spec.h"

namespace jax_flash {

inline constexpr float kFloat8Max = 448.0f;

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
JF_HD float float8_to_float(uint8_t x) {
  const uint32_t magnitude = (x & 0x7Fu) << 20;
  const uint32_t denormal = float_bits(float_of_bits(magnitude + 0x3C800000u) - 0.015625f);  // 2^-6
  const uint32_t bits = magnitude < 0x00800000u ? denormal : magnitude + 0x3C000000u;
  return float_of_bits((magnitude == 0x07F00000u ? 0x7FC00000u : bits) | (x & 0x80u) << 24);
}

// Rounds to nearest, ties to even; saturates at ±448; NaN stays NaN.
JF_HD uint8_t float_to_float8(float x) {
  const uint32_t bits = float_bits(x), sign = bits >> 24 & 0x80u, magnitude = bits & 0x7FFFFFFFu;
  // Below 2^-6 the sum with 2^14 rounds to multiples of 2^-9, the denormal step.
  const uint32_t denormal = float_bits(float_of_bits(magnitude) + 16384.0f) - 0x46800000u;
  const uint32_t normal = (magnitude - 0x3C000000u + 0x7FFFFu + (magnitude >> 20 & 1u)) >> 20;
  uint32_t y = magnitude < 0x3C800000u ? denormal : normal;
  y = magnitude > 0x43E00000u ? 0x7Eu : y;  // 448
  y = magnitude > 0x7F800000u ? 0x7Fu : y;
  return static_cast<uint8_t>(y | sign);
}

}  // namespace jax_flash
