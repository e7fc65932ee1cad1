#include "cuda/backward/convert.h"

#include "core/plan.h"
#include "cuda/launch.h"
#include "cuda/ptx/math.cuh"
#include "cuda/ptx/reduce.cuh"

namespace jax_flash {
namespace {

constexpr int kThreads = 256, kPerThread = 8;  // head dims are multiples of 8

// Rows of heads.
int64_t rows(const Problem& p) { return p.leading.count() * (p.packed() ? 1 : p.batch) * p.q_rows * p.heads; }

// Thread by thread 8 columns, one of the two 8-column tiles of a block of 16.
template <class T>
__global__ void __launch_bounds__(kThreads)
    convert(T* to, const float* from, int64_t rows, int32_t head_dim, float scale) {
  const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int32_t per_row = head_dim / kPerThread;
  if (at >= rows * per_row) return;
  const int64_t row = at / per_row;
  const int32_t tile = static_cast<int32_t>(at % per_row);
  const float* const block = from + row * accumulator_columns(head_dim) + tile / 2 * 16;
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    const int i = tile % 2 * 2;
    ptx::store_pair(to + at * kPerThread + 2 * t, block[ptx::quad_position(t, i)] * scale,
                    block[ptx::quad_position(t, i + 1)] * scale);
  }
}

template <class T>
cudaError_t launch_convert(const Problem& p, const float* accumulator, cudaStream_t stream) {
  const int64_t count = rows(p) * (p.head_dim / kPerThread);
  return launch(convert<T>, ceil_div(count, kThreads), kThreads, 0, stream, p.dquery.as<T>(), accumulator,
                rows(p), p.head_dim, p.spec.scale);
}

}  // namespace

cudaError_t clear_accumulator(const Problem& p, float* accumulator, cudaStream_t stream) {
  const int64_t count = rows(p) * accumulator_columns(p.head_dim);
  if (count == 0) return cudaSuccess;
  return cudaMemsetAsync(accumulator, 0, count * sizeof(float), stream);
}

cudaError_t convert_accumulator(const Problem& p, const float* accumulator, cudaStream_t stream) {
  if (p.dtype == DType::kF16) return launch_convert<float16>(p, accumulator, stream);
  if (p.dtype == DType::kBF16) return launch_convert<bfloat16>(p, accumulator, stream);
  return launch_convert<float32>(p, accumulator, stream);
}

}  // namespace jax_flash
