// append_kv on CUDA.
#pragma once

#include <cuda_runtime_api.h>

#include "core/problem.h"

namespace jax_flash {

// Writes the new tokens of the call into its pools, in place.
cudaError_t launch_append(const AppendProblem& p, int32_t sm_count, cudaStream_t stream);

}  // namespace jax_flash
