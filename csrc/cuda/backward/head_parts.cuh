// The backward of a call whose query heads are divided into parts (LaunchPlan::parts). The kernel runs a
// call with a KV head for each part, whose dK and dV go to the workspace in float32; another kernel adds
// them.
#pragma once

#include <utility>

#include "core/plan/launch_plan.h"
#include "core/problem.h"
#include "cuda/backward/query_sums.cuh"
#include "cuda/launch.h"
#include "cuda/ptx/math.cuh"

namespace jax_flash::inline JF_ARCH_NAMESPACE {

// The call that the kernel runs. The strides of its dkey and dvalue are those of 16-bit elements, of which a
// float has two (store_gradient_rows). There is at most one leading dimension.
inline Problem with_head_parts(const Problem& p, const LaunchPlan& plan, void* workspace) {
  if (plan.parts == 1) return p;
  Problem parts = p;
  parts.kv_heads *= plan.parts;
  auto* data = reinterpret_cast<float*>(static_cast<char*>(workspace) + plan.part_sums);
  for (auto [view, columns] : {std::pair{&parts.dkey, p.head_dim}, std::pair{&parts.dvalue, p.value_dim}}) {
    const int64_t row = int64_t{parts.kv_heads} * columns, entry = row * p.k_rows;
    const int64_t leading = p.packed() ? entry : p.batch * entry;
    *view = {data, {2 * leading}, p.packed() ? 0 : 2 * entry, 2 * columns, 2 * row, 2};
    data += sum_entries(p) * entry;
  }
  return parts;
}

inline constexpr int kPartThreads = 256, kPartColumns = 8;

// Adds the parts of 8 columns of a row: of dK, or in the second slice of the grid of dV.
template <class T>
__global__ void __launch_bounds__(kPartThreads)
    add_parts(const __grid_constant__ Problem p, const float* dkeys, const float* dvalues, int32_t parts) {
  const bool of_value = blockIdx.y == 1;
  const View& to = of_value ? p.dvalue : p.dkey;
  const uint32_t columns = of_value ? p.value_dim : p.head_dim, heads = p.kv_heads, rows = p.k_rows;
  const uint32_t batch = p.packed() ? 1 : p.batch, entries = static_cast<uint32_t>(p.leading.count()) * batch;
  const uint32_t chunks = columns / kPartColumns, unit = blockIdx.x * kPartThreads + threadIdx.x;
  if (unit >= entries * rows * heads * chunks) return;
  const uint32_t number = unit / chunks, column = unit % chunks * kPartColumns;
  const float* from = (of_value ? dvalues : dkeys) + int64_t{number} * parts * columns + column;
  float x[kPartColumns] = {};
  for (int32_t part = 0; part < parts; ++part, from += columns) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float4 y = reinterpret_cast<const float4*>(from)[half];
      float* const sum = x + 4 * half;
      sum[0] += y.x, sum[1] += y.y, sum[2] += y.z, sum[3] += y.w;
    }
  }
  alignas(16) T rounded[kPartColumns];
#pragma unroll
  for (int i = 0; i < kPartColumns; i += 2) ptx::store_pair(rounded + i, x[i], x[i + 1]);
  const uint32_t row = number / heads, entry = row / rows;
  T* const data = to.as<T>() + int64_t{entry / batch} * to.leading[0];
  *reinterpret_cast<uint4*>(data + to.offset(entry % batch, number % heads, row % rows, column)) =
      *reinterpret_cast<const uint4*>(rounded);
}

// dK and dV of `p` from those of `parts`, the call of the kernel.
template <class T>
cudaError_t sum_head_parts(const Problem& p, const Problem& parts, int32_t count, cudaStream_t stream) {
  const int64_t rows = sum_entries(p) * p.k_rows * p.kv_heads;
  const int64_t units = rows * std::max(p.head_dim, p.value_dim) / kPartColumns;
  return launch(add_parts<T>, {ceil_div(units, kPartThreads), 2}, kPartThreads, 0, stream, p,
                parts.dkey.as<const float>(), parts.dvalue.as<const float>(), count);
}

}  // namespace jax_flash::inline JF_ARCH_NAMESPACE
