// TMA tensor maps of operands. The host encodes them and passes them to kernels by value.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "core/problem.h"

namespace jax_flash {

// An operand [leading, batch, row, head, column] of 16-bit elements, float32 or bytes. A box is [box_rows,
// box_heads, box_columns], one panel of a SharedTile with its swizzle.
struct MapShape {
  int32_t columns, heads, rows, batch;
  int32_t box_columns, box_rows;
  int32_t box_heads = 1;
  int32_t element_bytes = 2;
};

// Encodes the map of `view`, with the view's strides. A dimension with stride 0 gets size 1. There is at most
// one leading dimension.
cudaError_t make_tensor_map(CUtensorMap& map, const Problem& p, const View& view, const MapShape& shape);

// Pages [leading, page, row, head, column] of 16-bit elements. A box is [box_rows / 8, panels, 8, 64
// columns]: all panels of a head's rows, as a GroupedTile has them.
struct PageMap : CUtensorMap {
  // Strides: from one head to the next in panels and in groups of 8 rows; from one page to the next in
  // groups.
  int32_t head_panels, head_groups, page_groups;
};

// Whether such boxes can load heads of `columns` columns. They can if all rows of the pool, taken page by
// page and either token by token or head by head, have one stride.
bool has_page_map(const Problem& p, const View& view, int32_t columns);
cudaError_t make_page_map(PageMap& map, const Problem& p, const View& view, int32_t columns,
                          int32_t box_rows);

}  // namespace jax_flash
