#include "tensor_map.h"

#include <cudaTypedefs.h>

#include <algorithm>

namespace jax_flash {
namespace {

using Encode = PFN_cuTensorMapEncodeTiled_v12000;

// Looked up through the runtime, so that the library does not link to libcuda.
Encode find_encode() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult status = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t e =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &status);
#else
  const cudaError_t e = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &status);
#endif
  const bool usable = e == cudaSuccess && status == cudaDriverEntryPointSuccess;
  return usable ? reinterpret_cast<Encode>(found) : nullptr;
}

constexpr cuuint32_t kRank = 5;
constexpr cuuint64_t kUnusedStride = 16;  // for a dimension of size 1, any valid stride

// Sizes, strides in bytes from the second dimension on, and the box of a map, innermost dimension first.
struct Layout5 {
  cuuint64_t dims[kRank], bytes[kRank - 1];
  cuuint32_t box[kRank];
};

cudaError_t encode(CUtensorMap& map, void* data, const Layout5& layout, CUtensorMapDataType type,
                   CUtensorMapSwizzle swizzle) {
  static const Encode found = find_encode();
  if (!found) return cudaErrorNotSupported;
  const cuuint32_t steps[kRank] = {1, 1, 1, 1, 1};
  const CUresult result = found(&map, type, kRank, data, layout.dims, layout.bytes, layout.box, steps,
                                CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

CUtensorMapDataType half_type(const Problem& p) {
  return p.dtype == DType::kF16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
}

// rows_first: a page stores row after row, each with all heads. heads_first: it stores head after head, each
// with all rows.
bool rows_first(const Problem& p, const View& view, int32_t columns) {
  return (p.kv_heads == 1 || view.head == columns) && view.batch == int64_t{p.page_size} * view.row;
}
bool heads_first(const Problem& p, const View& view) {
  return view.head == int64_t{p.page_size} * view.row && view.batch == int64_t{p.kv_heads} * view.head;
}

}  // namespace

cudaError_t make_tensor_map(CUtensorMap& map, const Problem& p, const View& view, const MapShape& shape) {
  const int64_t strides[] = {view.head, view.row, view.batch, view.leading[0]};
  const int64_t sizes[] = {shape.heads, shape.rows, shape.batch, p.leading.count()};
  Layout5 layout{{static_cast<cuuint64_t>(shape.columns)},
                 {},
                 {static_cast<cuuint32_t>(shape.box_columns), static_cast<cuuint32_t>(shape.box_heads),
                  static_cast<cuuint32_t>(shape.box_rows), 1, 1}};
  for (cuuint32_t i = 0; i + 1 < kRank; ++i) {
    const bool used = strides[i] != 0 && sizes[i] > 1;
    layout.dims[i + 1] = used ? static_cast<cuuint64_t>(sizes[i]) : 1;
    layout.bytes[i] = used ? static_cast<cuuint64_t>(strides[i] * shape.element_bytes) : kUnusedStride;
  }
  const int32_t panel = shape.box_columns * shape.element_bytes;
  const auto swizzle = panel == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                       : panel == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                     : CU_TENSOR_MAP_SWIZZLE_32B;
  // An operand without rows may have no memory. Nothing of it is copied, but the map needs a valid address.
  const bool empty = shape.rows == 0 || shape.heads == 0 || shape.batch == 0;
  void* data = empty ? p.query.data : view.data;
  const auto type = shape.element_bytes == 4   ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                    : shape.element_bytes == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                                               : half_type(p);
  return encode(map, data, layout, type, swizzle);
}

bool has_page_map(const Problem& p, const View& view, int32_t columns) {
  return columns % 64 == 0 && p.page_size % 8 == 0 && p.pages > 0 &&
         (rows_first(p, view, columns) || heads_first(p, view));
}

cudaError_t make_page_map(PageMap& map, const Problem& p, const View& view, int32_t columns,
                          int32_t box_rows) {
  const int32_t panels = columns / 64, groups = p.page_size / 8;
  const bool by_rows = rows_first(p, view, columns);
  map.head_panels = by_rows ? panels : 0;
  map.head_groups = by_rows ? 0 : groups;
  map.page_groups = by_rows ? groups : groups * p.kv_heads;
  const bool has_leading = view.leading[0] != 0 && p.leading.count() > 1;
  const auto size = [](int64_t x) { return static_cast<cuuint64_t>(std::max<int64_t>(1, x)); };
  const auto bytes = [](int64_t elements) { return static_cast<cuuint64_t>(elements) * 2; };
  const Layout5 layout{
      {64, 8, size(by_rows ? p.kv_heads * panels : panels), size(int64_t{p.pages} * map.page_groups),
       has_leading ? size(p.leading.count()) : 1},
      {bytes(view.row), bytes(64), bytes(8 * view.row), has_leading ? bytes(view.leading[0]) : kUnusedStride},
      {64, 8, static_cast<cuuint32_t>(panels), static_cast<cuuint32_t>(box_rows / 8), 1}};
  return encode(map, view.data, layout, half_type(p), CU_TENSOR_MAP_SWIZZLE_128B);
}

}  // namespace jax_flash
