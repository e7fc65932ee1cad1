// append_kv on CUDA.
#pragma once

#include <cuda_runtime_api.h>

#include "core/plan/call.h"
#include "core/problem.h"

namespace jax_flash {

// Writes the new tokens of the call into its pools, in place.
cudaError_t launch_append(const AppendProblem& p, const Device& device, cudaStream_t stream);

}  // namespace jax_flash
