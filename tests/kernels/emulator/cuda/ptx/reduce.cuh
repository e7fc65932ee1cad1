// As csrc/cuda/ptx/reduce.cuh: fibers take turns.
#pragma once

namespace jax_flash::ptx {

inline int quad_position(int t, int i) { return 4 * t + i; }
inline void add_quad(float* block, int t, float a, float b, float c, float d) {
  const float x[] = {a, b, c, d};
  for (int i = 0; i < 4; ++i) block[quad_position(t, i)] += x[i];
}

}  // namespace jax_flash::ptx
