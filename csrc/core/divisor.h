// Divides numbers in [0, 2³¹) by a number that is known before a kernel is launched, with a product and a
// shift.
#pragma once

#include <cstdint>

#include "spec.h"

namespace jax_flash {

struct Divisor {
  int32_t value = 1;
  uint32_t multiplier = 1u << 31, shift = 31;  // n / value = n · multiplier >> shift

  Divisor() = default;
  explicit Divisor(int64_t divisor) : value(static_cast<int32_t>(divisor)) {
    while ((uint64_t{1} << (shift - 31)) < static_cast<uint64_t>(divisor)) ++shift;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << shift) + divisor - 1) / divisor);
  }

  JF_HD int32_t quotient(int32_t n) const {
    return static_cast<int32_t>(uint64_t{static_cast<uint32_t>(n)} * multiplier >> shift);
  }
  JF_HD int32_t remainder(int32_t n) const { return n - quotient(n) * value; }
};

}  // namespace jax_flash
