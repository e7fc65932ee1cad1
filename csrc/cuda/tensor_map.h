// Tensor maps: what the copy engine has to know of an operand. Made on the host, passed by value to kernels.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "core/problem.h"

namespace jax_flash {

// A 16-bit operand [leading, batch, row, head, column] with boxes of `box_rows` rows and one panel of
// `box_columns` of one head, swizzled as SharedTile. Its strides are those of the view; a dimension with
// stride 0 has size 1. No more than one leading dimension.
struct MapShape {
  int32_t columns, heads, rows, batch;
  int32_t box_columns, box_rows;
};

cudaError_t make_tensor_map(CUtensorMap& map, const Problem& p, const View& view, const MapShape& shape);

}  // namespace jax_flash
