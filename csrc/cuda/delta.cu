#include "cuda/delta.h"

#include <algorithm>
#include <bit>

#include "core/views.h"
#include "cuda/launch.h"
#include "cuda/ptx/math.cuh"

namespace jax_flash {
namespace {

constexpr int kThreads = 256, kOwn = 2;  // rows whose loads a thread has in flight
constexpr int kLeastTokens = 8;

// A block has all combinations of some tokens and some heads, so that it stores contiguous tokens of each
// head. kLanes lanes share a row.
template <int kLanes>
struct Grid {
  static constexpr int kAtOnce = kThreads / kLanes, kRows = kOwn * kAtOnce;
  int32_t heads_log2;                // of a block's heads
  uint32_t head_blocks, row_blocks;  // that hold all heads, and all tokens

  explicit Grid(const DeltaCall& call) {
    const auto most = static_cast<uint32_t>(std::min<int64_t>(call.heads, kRows / kLeastTokens));
    heads_log2 = static_cast<int32_t>(std::bit_width(most)) - 1;
    head_blocks = static_cast<uint32_t>(ceil_div(call.heads, heads()));
    row_blocks = static_cast<uint32_t>(ceil_div(call.rows, tokens()));
  }
  JF_HD int32_t heads() const { return 1 << heads_log2; }
  JF_HD int32_t tokens() const { return kRows >> heads_log2; }
};

template <class T, int kColumns>
struct alignas(sizeof(T) * kColumns) Chunk {
  T x[kColumns];
};

// delta of a block's rows. A lane loads kColumns elements at once.
template <class T, int kColumns, int kLanes>
__global__ void __launch_bounds__(kThreads)
    row_products(const __grid_constant__ DeltaCall call, const __grid_constant__ Grid<kLanes> grid) {
  using Elements = Chunk<T, kColumns>;
  __shared__ float sums[grid.kRows];
  const uint32_t rest = blockIdx.x / grid.head_blocks;
  const int64_t first_row = int64_t{rest % grid.row_blocks} * grid.tokens(), entry = rest / grid.row_blocks;
  const int64_t first_head = int64_t{blockIdx.x % grid.head_blocks} * grid.heads();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kLanes;
  const T *out[kOwn], *d_out[kOwn];  // of the thread's rows, or of others where these do not exist
  float sum[kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int r = thread / kLanes + i * grid.kAtOnce;
    const int64_t row = min(first_row + (r >> grid.heads_log2), call.rows - 1);
    const int64_t head = min(first_head + (r & (grid.heads() - 1)), call.heads - 1);
    const int64_t at = ((entry * call.rows + row) * call.heads + head) * call.columns;
    out[i] = static_cast<const T*>(call.out) + at, d_out[i] = static_cast<const T*>(call.d_out) + at;
    sum[i] = 0;
  }
#pragma unroll 1
  for (int column = lane * kColumns; column < call.columns; column += kLanes * kColumns) {
    Elements x[kOwn], y[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      x[i] = *reinterpret_cast<const Elements*>(out[i] + column);
      y[i] = *reinterpret_cast<const Elements*>(d_out[i] + column);
    }
#pragma unroll
    for (int i = 0; i < kOwn; ++i)
#pragma unroll
      for (int e = 0; e < kColumns; ++e)
        sum[i] = fmaf(static_cast<float>(x[i].x[e]), static_cast<float>(y[i].x[e]), sum[i]);
  }
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
#pragma unroll
    for (int apart = kLanes / 2; apart > 0; apart /= 2) sum[i] += __shfl_xor_sync(~0u, sum[i], apart);
    if (lane == 0) sums[thread / kLanes + i * grid.kAtOnce] = sum[i];
  }
  __syncthreads();
  const int token = thread & (grid.tokens() - 1), own_head = thread / grid.tokens();
  const int64_t row = first_row + token, head = first_head + own_head;
  if (thread < grid.kRows && row < call.rows && head < call.heads)
    call.delta[(entry * call.heads + head) * call.rows + row] = sums[token << grid.heads_log2 | own_head];
}

template <class T, int kColumns, int kLanes>
cudaError_t launch_lanes(const DeltaCall& call, cudaStream_t stream) {
  const Grid<kLanes> grid(call);
  return launch(row_products<T, kColumns, kLanes>, call.entries * grid.row_blocks * grid.head_blocks,
                kThreads, 0, stream, call, grid);
}

// Rows whose length is no multiple of 16 bytes are loaded element by element.
template <class T>
cudaError_t launch_dtype(const DeltaCall& call, cudaStream_t stream) {
  constexpr int kChunk = 16 / sizeof(T);
  if (call.columns % kChunk != 0) return launch_lanes<T, 1, 32>(call, stream);
  const int64_t chunks = call.columns / kChunk;
  return chunks <= 8    ? launch_lanes<T, kChunk, 8>(call, stream)
         : chunks <= 16 ? launch_lanes<T, kChunk, 16>(call, stream)
                        : launch_lanes<T, kChunk, 32>(call, stream);
}

}  // namespace

cudaError_t launch_delta(const DeltaCall& call, cudaStream_t stream) {
  if (call.entries * call.rows * call.heads == 0) return cudaSuccess;
  switch (call.dtype) {
    case DType::kF16:
      return launch_dtype<float16>(call, stream);
    case DType::kBF16:
      return launch_dtype<bfloat16>(call, stream);
    case DType::kF32:
      return launch_dtype<float32>(call, stream);
    default:
      return cudaErrorNotSupported;
  }
}

}  // namespace jax_flash
