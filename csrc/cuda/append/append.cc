#include "cuda/append/append.h"

#include <limits>

#include "cuda/registry.h"

namespace jax_flash {
namespace {

bool runs(const KernelRow& row, const AppendProblem& p, const Device& device) {
  return row.pass == Pass::kAppend && row.arch->covers(device.capability) && row.takes(p.dtype) &&
         row.takes(p.pool_dtype) && (row.design == Design::kDynamic) == p.dynamic;
}

// The same call with each pair of float8 elements as one 16-bit element, for float8 that is only copied. All
// sizes and strides are multiples of the head dims, which are even.
AppendProblem in_pairs(AppendProblem p) {
  for (View* view : {&p.key, &p.value, &p.k_pages, &p.v_pages}) {
    for (int64_t* stride : {&view->batch, &view->head, &view->row}) *stride /= 2;
    for (int64_t& stride : view->leading) stride /= 2;
  }
  p.head_dim /= 2, p.value_dim /= 2;
  p.dtype = p.pool_dtype = DType::kF16;
  return p;
}

}  // namespace

// Rows of the newest arch are tried first, then in the table's order. A row may leave a call to the next row.
cudaError_t launch_append(const AppendProblem& p, const Device& device, cudaStream_t stream) {
  if (is_float8(p.dtype)) return launch_append(in_pairs(p), device, stream);
  const int64_t tokens = int64_t{p.q_rows} * (p.packed() ? 1 : p.batch);
  if (tokens == 0 || p.batch == 0 || p.pages == 0 || p.kv_heads == 0) return cudaSuccess;
  if (tokens > std::numeric_limits<int32_t>::max() / 2) return cudaErrorInvalidValue;
  const std::span<const KernelRow> rows = built_kernels();
  for (int32_t newest = std::numeric_limits<int32_t>::max(); newest > 0;) {
    int32_t next = 0;  // the newest arch among those older than `newest`
    for (const KernelRow& row : rows)
      if (runs(row, p, device) && row.arch->oldest < newest) next = std::max(next, row.arch->oldest);
    for (int32_t i = 0; i < static_cast<int32_t>(rows.size()); ++i) {
      if (!runs(rows[i], p, device) || rows[i].arch->oldest != next) continue;
      const cudaError_t e = append_launch_of(i)(p, device, stream);
      if (e != cudaErrorNotSupported) return e;
    }
    newest = next;
  }
  return cudaErrorNotSupported;
}

}  // namespace jax_flash
