// As csrc/cuda/ptx/reduce.cuh: fibers take turns.
#pragma once

namespace jax_flash::ptx {

inline void add_pair(float* to, float low, float high) { to[0] += low, to[1] += high; }

}  // namespace jax_flash::ptx
