// Elements of f16, bf16, f32 and float8 arrays as float, one at a time.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/spec.h"

namespace jax_flash {

#if defined(__aarch64__)
using Half = __fp16;  // which GCC 12 knows in C++ there
#else
using Half = _Float16;
#endif

inline float value_of(DType dtype, const char* p) {
  if (dtype == DType::kF32) return *reinterpret_cast<const float*>(p);
  if (dtype == DType::kF8E4M3) {
    const int bits = *reinterpret_cast<const uint8_t*>(p), exponent = bits >> 3 & 15, mantissa = bits & 7;
    const float magnitude = (bits & 127) == 127 ? std::nanf("")
                            : exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -9)
                                            : std::ldexp(8.0f + static_cast<float>(mantissa), exponent - 10);
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
  } else if (dtype == DType::kF8E4M3) {  // towards zero: any value will do
    int bits = std::isnan(x) ? 127 : 0;
    for (char candidate; bits < 126; ++bits) {
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

inline size_t size_of(DType dtype) { return dtype == DType::kF32 ? 4 : dtype == DType::kF8E4M3 ? 1 : 2; }

}  // namespace jax_flash
