// Where the drivers run the passes: backend_cpu.cc, or backend_cuda.cc on copies in the GPU's memory.
#pragma once

#include <string>

#include "core/problem.h"
#include "cpu/parallel.h"

namespace jax_flash::backend {

std::string name();  // of the instruction set or the GPU; throws where there is none

int32_t width(int32_t any);                             // a head dim that it takes
bool repeatable(const AttentionSpec& spec, Pass pass);  // the same bits at every run

// False where no kernel was built for the call. `pool` matters to the CPU alone.
bool run(Pass pass, const Problem& problem, const ThreadPool& pool);

bool append(const AppendProblem& problem, const ThreadPool& pool);

std::string summary();  // of the calls so far; throws where they left something unchecked

}  // namespace jax_flash::backend
