// The score options, element by element: s = softcap(scale q·k, c) + bias + alibi(slope, c(i), j).
#pragma once

#include <cmath>

#include "spec.h"

namespace jax_flash {

inline constexpr float kLog2e = 1.44269504088896340736f;
inline constexpr float kLn2 = 0.69314718055994530942f;

// softcap(s) = c tanh(s / c)
JF_HD float softcap(float s, float c) { return c * tanhf(s / c); }

// ∂softcap/∂s = 1 − tanh²(s / c), from the capped score c tanh(s / c).
JF_HD float softcap_gradient(float capped, float c) {
  const float t = capped / c;
  return 1.0f - t * t;
}

// −slope |c(i) − j|, the ALiBi bias of key j in the row whose diagonal is key c(i).
JF_HD float alibi(float slope, int64_t diagonal, int32_t j) {
  const int64_t distance = diagonal - j;
  return -slope * static_cast<float>(distance < 0 ? -distance : distance);
}

}  // namespace jax_flash
