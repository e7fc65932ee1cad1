// delta = rowsum(dO ∘ O) of calls that must give the same bits in every process.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/problem.h"

namespace jax_flash {

// O and dO [entries, rows, heads, columns], and delta [entries, heads, rows].
struct DeltaCall {
  const void *out, *d_out;
  float* delta;
  DType dtype = DType::kF32;
  int64_t entries = 1, rows = 0, heads = 0, columns = 0;
};

// The order of the additions depends only on `columns` and the dtype.
cudaError_t launch_delta(const DeltaCall& call, cudaStream_t stream);

}  // namespace jax_flash
