#pragma once

#include "emulator.h"

struct __nv_bfloat16 {
  uint16_t x;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float value) {  // rounds to nearest even
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    x = static_cast<uint16_t>(value != value ? 0x7FC0 : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
  }
  operator float() const {
    const uint32_t bits = uint32_t{x} << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
};
