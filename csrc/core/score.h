// Scores are s = softcap(scale · q·k, c) + bias − slope · |c(i) − j|, with softcap(s, c) = c · tanh(s / c);
// with bias_first, softcap(scale · q·k + bias, c) − slope · |c(i) − j|. Kernels compute log2(e) · s, and P as
// powers of two.
#pragma once

#include <cmath>

#include "spec.h"

namespace jax_flash {

inline constexpr float kLog2e = 1.44269504088896340736f;
inline constexpr float kLn2 = 0.69314718055994530942f;

// Up to this softcap tanh may have an absolute error of 1e-6 where P is rounded to 16 bits: the error of the
// scores, 1e-6 · c, changes P by less than its rounding does.
inline constexpr float kMaxCoarseSoftcap = 64.0f;

// The score that a bias is added to. A bias of −∞ hides the key, whatever the score is, NaN and +∞ included.
JF_HD float under_bias(float score, float bias) { return bias == -INFINITY ? 0.0f : score; }

}  // namespace jax_flash
