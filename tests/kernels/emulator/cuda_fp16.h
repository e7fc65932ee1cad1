#pragma once

#include "emulator.h"

struct __half {
  _Float16 x;
  __half() = default;
  explicit __half(float value) : x(static_cast<_Float16>(value)) {}
  operator float() const { return static_cast<float>(x); }
};
