// The float32 accumulator of dQ: dquery's rows of heads, each of accumulator_columns(d) whose blocks of 16
// are in the order of ptx::add_quad.
#pragma once

#include "core/plan.h"
#include "core/problem.h"
#include "cuda/launch.h"
#include "cuda/ptx/math.cuh"
#include "cuda/ptx/reduce.cuh"

// Each kernel of the backward has its own: that order depends on the architecture compiled for, which is thus
// one for the two, where they are machine code and where the driver assembles them.
namespace jax_flash {
namespace {

constexpr int kConvertThreads = 256, kConvertColumns = 8;  // head dims are multiples of 8

// Rows of heads.
int64_t accumulator_rows(const Problem& p) {
  return p.leading.count() * (p.packed() ? 1 : p.batch) * p.q_rows * p.heads;
}

// Thread by thread 8 columns, one of the two 8-column tiles of a block of 16.
template <class T>
__global__ void __launch_bounds__(kConvertThreads)
    convert(T* to, const float* from, int64_t rows, int32_t head_dim, float scale) {
  const int64_t at = int64_t{blockIdx.x} * kConvertThreads + threadIdx.x;
  const int32_t per_row = head_dim / kConvertColumns;
  if (at >= rows * per_row) return;
  const int64_t row = at / per_row;
  const int32_t tile = static_cast<int32_t>(at % per_row);
  const float* const block = from + row * accumulator_columns(head_dim) + tile / 2 * 16;
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    const int i = tile % 2 * 2;
    ptx::store_pair(to + at * kConvertColumns + 2 * t, block[ptx::quad_position(t, i)] * scale,
                    block[ptx::quad_position(t, i + 1)] * scale);
  }
}

cudaError_t clear_accumulator(const Problem& p, float* accumulator, cudaStream_t stream) {
  const int64_t count = accumulator_rows(p) * accumulator_columns(p.head_dim);
  if (count == 0) return cudaSuccess;
  return cudaMemsetAsync(accumulator, 0, count * sizeof(float), stream);
}

// dquery = scale · accumulator, rounded.
template <class T>
cudaError_t convert_accumulator(const Problem& p, const float* accumulator, cudaStream_t stream) {
  const int64_t rows = accumulator_rows(p), count = rows * (p.head_dim / kConvertColumns);
  return launch(convert<T>, ceil_div(count, kConvertThreads), kConvertThreads, 0, stream, p.dquery.as<T>(),
                accumulator, rows, p.head_dim, p.spec.scale);
}

}  // namespace
}  // namespace jax_flash
