// Splits a call with several leading dimensions into calls with one, because tensor maps have room for one.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/schema.h"
#include "cuda/registry.h"

namespace jax_flash {

// The number of slices of a call: the entries of all leading dimensions but the last.
inline int64_t leading_slices(const Problem& p) {
  return p.leading.rank <= 1 ? 1 : p.leading.count() / p.leading.size[p.leading.rank - 1];
}

// Slice `index`: the entries of the last leading dimension.
inline Problem leading_slice(const Problem& p, int64_t index) {
  const int last = p.leading.rank - 1;
  Leading others = p.leading;
  others.rank = last;
  Problem slice = p;
  slice.leading = {1, {p.leading.size[last]}};
  const auto cut = [&](const schema::Array& array) {
    if (!array.view) return;  // arrays of the tangent pass have no tensor maps
    View& view = slice.*array.view;
    const int64_t bytes = element_bytes(p, array.element);
    if (view) view.data = view.as<uint8_t>() + view.leading_offset(others, index) * bytes;
    view.leading[0] = view.leading[last];
  };
  for (const schema::Array& array : schema::kOwn) cut(array);
  for (const schema::Array& array : schema::kLike) cut(array);
  return slice;
}

// Calls launch(slice, its plan) for all slices, one after another in the same workspace. `grid`: the grid of
// the plan whose blocks the slices divide. If there are several slices, each makes its own schedules.
template <class Launch>
cudaError_t launch_slices(const Problem& p, LaunchPlan plan, TileGrid LaunchPlan::* grid, void* workspace,
                          cudaStream_t stream, Launch launch) {
  if (p.leading.rank <= 1) return launch(p, plan);
  const int64_t count = leading_slices(p);
  (plan.*grid).blocks /= count;
  for (int64_t i = 0; i < count; ++i) {
    const Problem slice = leading_slice(p, i);
    if (cudaError_t e = launch_schedules(slice, plan, workspace, stream); e != cudaSuccess) return e;
    if (cudaError_t e = launch(slice, plan); e != cudaSuccess) return e;
  }
  return cudaSuccess;
}

}  // namespace jax_flash
