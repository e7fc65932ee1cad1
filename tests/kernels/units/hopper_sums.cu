// Sums that the two CTAs of a cluster make together. Needs an sm_90 GPU.
#include <cstdint>
#include <cstdio>

#include "cuda/hopper/sum_parts.cuh"
#include "cuda/launch.h"
#include "cuda/ptx/shared.cuh"
#include "cuda/tile/accumulator.cuh"
#include "hopper_units.h"

namespace jax_flash {
namespace {

constexpr int kCtas = 4, kConsumers = 2, kThreads = kConsumers * kWarpgroup;
constexpr uint32_t kSums = 7;
using Sum = Accumulator<1, 8>;
using Parts = SumParts<Sum, kConsumers>;

// An element of a CTA's part: integers whose sums are exact.
__device__ float part(uint32_t cta, uint32_t sum, int n, int i) {
  return static_cast<float>(((cta * kSums + sum) * kThreads + threadIdx.x) * 32 + n * 4 + i);
}

// Counts the elements that differ from the sum of both parts. Each CTA in turn is late.
__global__ void __launch_bounds__(kThreads) sums(int* wrong) {
  constexpr int64_t kLate = 20000;
  auto& parts = *reinterpret_cast<Parts*>(ptx::dynamic_shared_1024());
  if (threadIdx.x == 0) {
    parts.init(kConsumerWarps * ptx::kWarpArrivals);
    ptx::fence_barriers();
  }
  __syncthreads();
  ptx::sync_cluster();
  int differ = 0;
  for (uint32_t use = 0; use < kSums; ++use) {
    const int64_t start = clock64();
    while (use % 3 == blockIdx.x % 2 && clock64() - start < kLate) continue;
    Sum x;
    for (int n = 0; n < Sum::kColumnTiles; ++n)
      for (int i = 0; i < 4; ++i) x.x[0][n][i] = part(blockIdx.x, use, n, i);
    parts.add(x, static_cast<int>(threadIdx.x) / kWarpgroup, use);
    for (int n = 0; n < Sum::kColumnTiles; ++n)
      for (int i = 0; i < 4; ++i)
        differ += x.x[0][n][i] != part(blockIdx.x, use, n, i) + part(blockIdx.x ^ 1, use, n, i);
  }
  if (differ > 0) atomicAdd(wrong, differ);
  __syncwarp();
  ptx::sync_cluster();
}

}  // namespace

int run_sums() {
  int *counter, wrong = 0;
  check(cudaMalloc(&counter, sizeof(int)), "cudaMalloc");
  check(cudaMemset(counter, 0, sizeof(int)), "memset");
  check(launch_clusters(sums, 2, kCtas, kThreads, sizeof(Parts), nullptr, counter), "sums");
  check(cudaMemcpy(&wrong, counter, sizeof(int), cudaMemcpyDeviceToHost), "sums");
  cudaFree(counter);
  std::printf(wrong ? "SumParts: FAILED, %d wrong\n" : "SumParts: ok\n", wrong);
  return wrong;
}

}  // namespace jax_flash
