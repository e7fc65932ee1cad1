#include "cuda/delta.h"

#include <algorithm>
#include <bit>

#include "core/divisor.h"
#include "cuda/launch.h"
#include "cuda/ptx/math.cuh"

namespace jax_flash {
namespace {

// A block has kRows rows: all combinations of some tokens and some heads, so that it stores contiguous tokens
// of each head.
constexpr int kThreads = 256, kRows = 64, kMostHeads = 8;

struct Grid {
  int32_t heads_log2;                // of the heads of a block
  uint32_t head_blocks, row_blocks;  // that hold all heads and all tokens

  __host__ __device__ int32_t heads() const { return 1 << heads_log2; }
  __host__ __device__ int32_t tokens() const { return kRows >> heads_log2; }
};

template <class T, int kColumns>
struct alignas(sizeof(T) * kColumns) Chunk {
  T x[kColumns];
};

// delta of a block's rows. kLanes lanes share a row, and each loads kColumns elements at once.
template <class T, int kColumns, int kLanes>
__global__ void __launch_bounds__(kThreads)
    row_products(const __grid_constant__ DeltaCall call, const __grid_constant__ Grid grid) {
  using Elements = Chunk<T, kColumns>;
  constexpr int kAtOnce = kThreads / kLanes, kOwn = kRows / kAtOnce;
  __shared__ float sums[kRows];
  const uint32_t head_block = blockIdx.x % grid.head_blocks, rest = blockIdx.x / grid.head_blocks;
  const int64_t first_row = int64_t{rest % grid.row_blocks} * grid.tokens(), entry = rest / grid.row_blocks;
  const int64_t first_head = int64_t{head_block} * grid.heads();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kLanes;
  const auto* const d_out = static_cast<const T*>(call.d_out);
  const auto* const out = static_cast<const T*>(call.out);
  int64_t at[kOwn];  // the offset of each of the thread's rows; −1 if there is none
  float sum[kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int r = thread / kLanes + i * kAtOnce;
    const int64_t row = first_row + (r >> grid.heads_log2), head = first_head + (r & (grid.heads() - 1));
    const bool used = row < call.rows && head < call.heads;
    at[i] = used ? ((entry * call.rows + row) * call.heads + head) * call.columns : -1;
    sum[i] = 0;
  }
  for (int64_t column = lane * kColumns; column < call.columns; column += kLanes * kColumns) {
    Elements x[kOwn], y[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (at[i] < 0) continue;
      x[i] = *reinterpret_cast<const Elements*>(d_out + at[i] + column);
      y[i] = *reinterpret_cast<const Elements*>(out + at[i] + column);
    }
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (at[i] < 0) continue;
#pragma unroll
      for (int e = 0; e < kColumns; ++e)
        sum[i] = fmaf(static_cast<float>(x[i].x[e]), static_cast<float>(y[i].x[e]), sum[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
#pragma unroll
    for (int apart = kLanes / 2; apart > 0; apart /= 2) sum[i] += __shfl_xor_sync(~0u, sum[i], apart);
    if (lane == 0) sums[thread / kLanes + i * kAtOnce] = sum[i];
  }
  __syncthreads();
  if (thread >= kRows) return;
  const int token = thread & (grid.tokens() - 1);
  const int64_t row = first_row + token, head = first_head + thread / grid.tokens();
  if (row < call.rows && head < call.heads)
    call.delta[(entry * call.heads + head) * call.rows + row] =
        sums[token << grid.heads_log2 | thread / grid.tokens()];
}

template <class T, int kColumns>
cudaError_t launch_columns(const DeltaCall& call, const Grid& grid, int64_t blocks, cudaStream_t stream) {
  const int64_t chunks = call.columns / kColumns;
  auto* const kernel = chunks <= 8    ? row_products<T, kColumns, 8>
                       : chunks <= 16 ? row_products<T, kColumns, 16>
                                      : row_products<T, kColumns, 32>;
  return launch(kernel, blocks, kThreads, 0, stream, call, grid);
}

// Rows whose length is no multiple of 16 bytes are loaded element by element.
template <class T>
cudaError_t launch_dtype(const DeltaCall& call, const Grid& grid, int64_t blocks, cudaStream_t stream) {
  constexpr int kChunk = 16 / sizeof(T);
  return call.columns % kChunk == 0 ? launch_columns<T, kChunk>(call, grid, blocks, stream)
                                    : launch_columns<T, 1>(call, grid, blocks, stream);
}

}  // namespace

cudaError_t launch_delta(const DeltaCall& call, cudaStream_t stream) {
  if (call.entries * call.rows * call.heads == 0) return cudaSuccess;
  const auto heads = static_cast<uint32_t>(std::min<int64_t>(call.heads, kMostHeads));
  Grid grid{static_cast<int32_t>(std::bit_width(heads)) - 1, 0, 0};
  grid.head_blocks = static_cast<uint32_t>(ceil_div(call.heads, grid.heads()));
  grid.row_blocks = static_cast<uint32_t>(ceil_div(call.rows, grid.tokens()));
  const int64_t blocks = call.entries * grid.row_blocks * grid.head_blocks;
  switch (call.dtype) {
    case DType::kF16:
      return launch_dtype<float16>(call, grid, blocks, stream);
    case DType::kBF16:
      return launch_dtype<bfloat16>(call, grid, blocks, stream);
    case DType::kF32:
      return launch_dtype<float32>(call, grid, blocks, stream);
    default:
      return cudaErrorNotSupported;
  }
}

}  // namespace jax_flash
