// Slices of columns. If a head is wider than the registers of a CTA allow (Row::slice_columns), the grid's
// second dimension counts slices of its columns. Each CTA computes S from the whole head, and the products of
// its own columns.
#pragma once

#include <cstdint>

#include "core/plan/row.h"
#include "cuda/tile/shared_tile.cuh"

namespace jax_flash {

// The first column that the CTA works on. C: a kernel's traits, with kSliced and kSliceColumns.
template <class C>
__device__ __forceinline__ int32_t first_column() {
  return C::kSliced ? static_cast<int32_t>(blockIdx.y) * C::kSliceColumns : 0;
}

// The byte offset of the slice in a tile that holds all columns. The slice is itself a SharedTile of
// kSliceColumns, because tiles are stored panel by panel.
template <class C, class Tile>
__device__ __forceinline__ uint32_t slice_offset() {
  return C::kSliced ? blockIdx.y * Tile::panel_offset(C::kSliceColumns / kChunk<typename Tile::Element>) : 0;
}

// slices_of() for a kernel; a constant if it has no slices.
template <class C>
constexpr JF_HD int32_t slice_count(int32_t columns) {
  return C::kSliced ? slices_of(columns, C::kSliceColumns) : 1;
}

}  // namespace jax_flash
