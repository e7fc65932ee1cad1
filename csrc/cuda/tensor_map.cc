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

}  // namespace

cudaError_t make_tensor_map(CUtensorMap& map, const Problem& p, const View& view, const MapShape& shape) {
  static const Encode encode = find_encode();
  if (!encode) return cudaErrorNotSupported;
  constexpr cuuint32_t kRank = 5;
  const int32_t element_bytes = shape.single ? 4 : 2;
  constexpr cuuint64_t kUnusedStride = 16;  // of a dimension of size 1: any valid stride
  const int64_t strides[] = {view.head, view.row, view.batch, view.leading[0]};
  const int64_t sizes[] = {shape.heads, shape.rows, shape.batch, p.leading.count()};
  cuuint64_t dims[kRank] = {static_cast<cuuint64_t>(shape.columns)}, bytes[kRank - 1];
  for (cuuint32_t i = 0; i + 1 < kRank; ++i) {
    const bool used = strides[i] != 0 && sizes[i] > 1;
    dims[i + 1] = used ? static_cast<cuuint64_t>(sizes[i]) : 1;
    bytes[i] = used ? static_cast<cuuint64_t>(strides[i]) * element_bytes : kUnusedStride;
  }
  const cuuint32_t box[kRank] = {static_cast<cuuint32_t>(shape.box_columns),
                                 static_cast<cuuint32_t>(shape.box_heads),
                                 static_cast<cuuint32_t>(shape.box_rows), 1, 1};
  const cuuint32_t steps[kRank] = {1, 1, 1, 1, 1};
  const auto type = shape.single             ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                    : p.dtype == DType::kF16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                             : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const auto swizzle =
      shape.box_columns * element_bytes == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
  // An operand without rows may have no memory. Nothing of it is copied, but the map needs a valid address.
  const bool empty = shape.rows == 0 || shape.heads == 0 || shape.batch == 0;
  void* data = empty ? p.query.data : view.data;
  const CUresult result =
      encode(&map, type, kRank, data, dims, bytes, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace jax_flash
