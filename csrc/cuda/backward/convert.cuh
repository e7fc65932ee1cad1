// The float32 accumulator of dQ: [leading, batch, s_q, h, accumulator_columns(d)]. Each block of 16 columns
// is in the order of ptx::add_quad.
#pragma once

#include "core/plan/launch_plan.h"
#include "core/problem.h"
#include "cuda/launch.h"
#include "cuda/ptx/math.cuh"
#include "cuda/ptx/reduce.cuh"
#include "cuda/tile/shared_tile.cuh"

// That order depends on the architecture that is compiled for. Hence the anonymous namespace: each backward
// file compiles its own conversion, so a kernel and its conversion always agree, as machine code and as PTX.
namespace jax_flash {
namespace {

constexpr int kConvertThreads = 256, kConvertColumns = 8;  // head dims are multiples of 8

// Query rows of all heads.
int64_t accumulator_rows(const Problem& p) {
  return p.leading.count() * (p.packed() ? 1 : p.batch) * p.q_rows * p.heads;
}

// to = scale · from, rounded. Each thread converts 8 columns, half a block of 16.
template <class T>
__global__ void __launch_bounds__(kConvertThreads)
    convert(T* to, const float* from, int64_t rows, int32_t head_dim, float scale) {
  const int64_t at = int64_t{blockIdx.x} * kConvertThreads + threadIdx.x;
  const int32_t per_row = head_dim / kConvertColumns;
  if (at >= rows * per_row) return;
  // The division of 64 bits is a long one, and seldom needed.
  const int64_t row = at >> 32 ? at / per_row : static_cast<uint32_t>(at) / static_cast<uint32_t>(per_row);
  const auto tile = static_cast<int32_t>(at - row * per_row);
  const float* const block = from + row * accumulator_columns(head_dim) + tile / 2 * kAccumulatorBlock;
  alignas(16) T out[kConvertColumns];
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    const int i = tile % 2 * 2;
    ptx::store_pair(out + 2 * t, block[ptx::quad_position(t, i)] * scale,
                    block[ptx::quad_position(t, i + 1)] * scale);
  }
#pragma unroll
  for (int i = 0; i < kConvertColumns; i += kChunk<T>)
    *reinterpret_cast<uint4*>(to + at * kConvertColumns + i) = *reinterpret_cast<const uint4*>(out + i);
}

// As an operand of float32.
[[maybe_unused]] View accumulator_view(const Problem& p, float* accumulator) {
  View view;
  view.data = accumulator;
  view.head = accumulator_columns(p.head_dim);
  view.row = p.heads * view.head;
  view.batch = p.q_rows * view.row;
  view.leading[0] = (p.packed() ? 1 : p.batch) * view.batch;
  return view;
}

cudaError_t clear_accumulator(const Problem& p, float* accumulator, cudaStream_t stream) {
  const int64_t count = accumulator_rows(p) * accumulator_columns(p.head_dim);
  if (count == 0) return cudaSuccess;
  return cudaMemsetAsync(accumulator, 0, count * sizeof(float), stream);
}

// dQ = scale · accumulator, rounded to T.
template <class T>
cudaError_t convert_accumulator(const Problem& p, const float* accumulator, cudaStream_t stream) {
  const int64_t rows = accumulator_rows(p), count = rows * (p.head_dim / kConvertColumns);
  return launch(convert<T>, ceil_div(count, kConvertThreads), kConvertThreads, 0, stream, p.dquery.as<T>(),
                accumulator, rows, p.head_dim, p.spec.scale);
}

}  // namespace
}  // namespace jax_flash
