// The float32 accumulator of dQ: in dquery's own order, so that it is turned into dquery element by element.
#pragma once

#include <cuda_runtime_api.h>

#include "core/problem.h"

namespace jax_flash {

cudaError_t clear_accumulator(const Problem& p, float* accumulator, cudaStream_t stream);

// dquery = scale · accumulator, rounded.
cudaError_t convert_accumulator(const Problem& p, const float* accumulator, cudaStream_t stream);

}  // namespace jax_flash
