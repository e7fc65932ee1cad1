// Scores are s = softcap(scale · q·k, c) + bias − slope · |c(i) − j|, with softcap(s, c) = c · tanh(s / c);
// kernels compute log2(e) · s, and P as powers of two.
#pragma once

namespace jax_flash {

inline constexpr float kLog2e = 1.44269504088896340736f;
inline constexpr float kLn2 = 0.69314718055994530942f;

}  // namespace jax_flash
