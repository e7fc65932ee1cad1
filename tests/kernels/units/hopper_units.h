// Shared by the unit tests of Hopper's instructions.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>

namespace jax_flash {

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::printf("%s: %s\n", what, cudaGetErrorString(status));
  std::exit(1);
}

// Returns how many values are wrong.
int run_sums();

}  // namespace jax_flash
