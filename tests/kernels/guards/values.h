// Elements of f16, bf16, f32 and float8 arrays as float, one at a time.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/spec.h"

namespace jax_flash {

#if defined(__aarch64__)
using Half = __fp16;  // GCC 12 does not know _Float16 in C++ on this platform
#else
using Half = _Float16;
#endif

inline float value_of(DType dtype, const char* p) {
  if (dtype == DType::kF32) return *reinterpret_cast<const float*>(p);
  if (is_float8(dtype)) {
    const bool e4m3 = dtype == DType::kF8E4M3;
    const int bits = *reinterpret_cast<const uint8_t*>(p), width = e4m3 ? 3 : 2, bias = e4m3 ? 7 : 15;
    const int exponent = (bits & 127) >> width, mantissa = bits & ((1 << width) - 1);
    const auto digits = static_cast<float>(mantissa + (exponent > 0 ? 1 << width : 0));
    float magnitude = std::ldexp(digits, std::max(exponent, 1) - bias - width);
    if (e4m3 ? (bits & 127) == 127 : exponent == 31) magnitude = !e4m3 && mantissa == 0 ? INFINITY : NAN;
    return bits & 128 ? -magnitude : magnitude;
  }
  const uint16_t h = *reinterpret_cast<const uint16_t*>(p);
  if (dtype == DType::kF16) return static_cast<float>(*reinterpret_cast<const Half*>(p));
  const uint32_t bits = static_cast<uint32_t>(h) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline void set_value(DType dtype, char* p, float x) {
  if (dtype == DType::kF32) {
    *reinterpret_cast<float*>(p) = x;
  } else if (is_float8(dtype)) {  // towards zero: any value will do
    int bits = std::isnan(x) ? 127 : 0;
    for (char candidate; bits < (dtype == DType::kF8E4M3 ? 126 : 123); ++bits) {
      candidate = static_cast<char>(bits + 1);
      if (!(value_of(dtype, &candidate) <= std::fabs(x))) break;
    }
    *reinterpret_cast<uint8_t*>(p) = static_cast<uint8_t>(bits | (std::signbit(x) ? 128 : 0));
  } else if (dtype == DType::kF16) {
    *reinterpret_cast<Half*>(p) = static_cast<Half>(x);
  } else {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    *reinterpret_cast<uint16_t*>(p) = static_cast<uint16_t>(bits >> 16 | (std::isnan(x) ? 0x40 : 0));
  }
}

}  // namespace jax_flash
