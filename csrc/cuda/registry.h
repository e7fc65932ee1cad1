// The kernels that this build holds, and the launch functions behind them.
#pragma once

#include <cuda_runtime_api.h>

#include <span>

#include "core/plan.h"

namespace jax_flash {

using Launch = cudaError_t(const Problem& p, const LaunchPlan& plan, void* workspace, cudaStream_t stream);

std::span<const KernelRow> built_kernels();
Launch* launch_of(int32_t kernel);  // an index into built_kernels()

// Builds the schedules that a plan asks for, in the workspace.
cudaError_t launch_schedules(const Problem& p, const LaunchPlan& plan, void* workspace, cudaStream_t stream);

// Where the schedule of a grid lies; null where it has none.
inline const TileWork* schedule_of(const TileGrid& grid, const void* workspace) {
  if (grid.schedule < 0) return nullptr;
  return reinterpret_cast<const TileWork*>(static_cast<const char*>(workspace) + grid.schedule);
}

// Where the sequences of packed queries begin, [n + 1] each 2 · (n + 2) apart: beside the schedule of the
// queries.
inline const int32_t* query_starts(const Problem& p, const TileGrid& grid, const void* workspace) {
  return reinterpret_cast<const int32_t*>(schedule_of(grid, workspace) + p.leading.count() * grid.tiles) + 1;
}

}  // namespace jax_flash
