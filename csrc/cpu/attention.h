// The CPU backend's passes, just under the FFI.
#pragma once

#include "../core/problem.h"
#include "parallel.h"

namespace jax_flash {

// Each writes every element of its results, for any problem whose views are in bounds, whatever the index
// arrays hold. Results do not depend on the pool. Only forward takes the
// paged layouts. head_dim and value_dim are at most kMaxHeadDim.
void cpu_forward(const Problem& problem, const ThreadPool& pool);
void cpu_backward(const Problem& problem, const ThreadPool& pool);
void cpu_bias_gradient(const Problem& problem, const ThreadPool& pool);

// Writes the new rows into the pools, wherever the tables send them; touches nothing outside the pools.
void cpu_append(const AppendProblem& problem, const ThreadPool& pool);

// The instruction set in use: "avx512_bf16", "avx512", "avx2" or "baseline". JAX_FLASH_CPU_ISA forces one
// that the machine has.
const char* cpu_isa();

}  // namespace jax_flash
