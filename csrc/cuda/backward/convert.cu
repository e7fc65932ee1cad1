#include "cuda/backward/convert.h"

#include "cuda/launch.h"
#include "cuda/ptx/math.cuh"

namespace jax_flash {
namespace {

constexpr int kThreads = 256, kPerThread = 8;  // head dims are multiples of 8

int64_t elements(const Problem& p) {
  return p.leading.count() * (p.packed() ? 1 : p.batch) * p.q_rows * p.heads * p.head_dim;
}

template <class T>
__global__ void __launch_bounds__(kThreads) convert(T* to, const float* from, int64_t count, float scale) {
  const int64_t at = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kPerThread;
  if (at >= count) return;
#pragma unroll
  for (int i = 0; i < kPerThread; i += 2) {
    const float2 x = *reinterpret_cast<const float2*>(from + at + i);
    ptx::store_pair(to + at + i, x.x * scale, x.y * scale);
  }
}

template <class T>
cudaError_t launch_convert(const Problem& p, const float* accumulator, cudaStream_t stream) {
  const int64_t count = elements(p);
  return launch(convert<T>, ceil_div(count, kThreads * kPerThread), kThreads, 0, stream, p.dquery.as<T>(),
                accumulator, count, p.spec.scale);
}

}  // namespace

cudaError_t clear_accumulator(const Problem& p, float* accumulator, cudaStream_t stream) {
  const int64_t count = elements(p);
  if (count == 0) return cudaSuccess;
  return cudaMemsetAsync(accumulator, 0, count * sizeof(float), stream);
}

cudaError_t convert_accumulator(const Problem& p, const float* accumulator, cudaStream_t stream) {
  if (p.dtype == DType::kF16) return launch_convert<float16>(p, accumulator, stream);
  if (p.dtype == DType::kBF16) return launch_convert<bfloat16>(p, accumulator, stream);
  return launch_convert<float32>(p, accumulator, stream);
}

}  // namespace jax_flash
