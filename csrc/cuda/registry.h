// The kernels that this build holds, and the launch functions behind them.
#pragma once

#include <cuda_runtime_api.h>

#include <span>

#include "core/plan.h"

namespace jax_flash {

using Launch = cudaError_t(const Problem& p, const LaunchPlan& plan, const TileWork* schedule,
                           cudaStream_t stream);

std::span<const KernelRow> built_kernels();
Launch* launch_of(int32_t kernel);  // an index into built_kernels()

// Builds the varlen schedule of a plan in its workspace; returns where it begins. Nothing to do when fixed.
cudaError_t launch_schedule(const Problem& p, const LaunchPlan& plan, int32_t block_m, void* workspace,
                            cudaStream_t stream);

}  // namespace jax_flash
