// The float32 accumulator of dQ: dquery's rows of heads, each of accumulator_columns(d) whose blocks of 16
// are in the order of ptx::add_quad.
#pragma once

#include <cuda_runtime_api.h>

#include "core/problem.h"

namespace jax_flash {

cudaError_t clear_accumulator(const Problem& p, float* accumulator, cudaStream_t stream);

// dquery = scale · accumulator, rounded.
cudaError_t convert_accumulator(const Problem& p, const float* accumulator, cudaStream_t stream);

}  // namespace jax_flash
