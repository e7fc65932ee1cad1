// The passes of the CPU backend, as the FFI handlers call them.
#pragma once

#include "../core/problem.h"
#include "parallel.h"

namespace jax_flash {

// Each pass writes every element of its results, for any problem whose views are in bounds, whatever the
// index arrays hold. Results do not depend on the number of threads. Only forward takes the paged layouts.
// head_dim and value_dim are at most kMaxHeadDim; where V is a part of K, head_dim is at most kMaxLatentDim.
void cpu_forward(const Problem& problem, const ThreadPool& pool);
void cpu_backward(const Problem& problem, const ThreadPool& pool);
void cpu_bias_gradient(const Problem& problem, const ThreadPool& pool);
void cpu_tangent(const Problem& problem, const Tangents& tangents, const ThreadPool& pool);

// Writes the new rows to the slots that the tables name, and skips entries outside the pools.
void cpu_append(const AppendProblem& problem, const ThreadPool& pool);

// The instruction set in use: "avx512_bf16", "avx512", "avx2" or "baseline". The environment variable
// JAX_FLASH_CPU_ISA selects a lower one.
const char* cpu_isa();

}  // namespace jax_flash
