// The exchanges between the two CTAs of a cluster. Needs an sm_90 GPU.
#include <cuda_bf16.h>

#include <cstdint>
#include <cstdio>

#include "cuda/hopper/row_exchange.cuh"
#include "cuda/hopper/sum_parts.cuh"
#include "cuda/launch.h"
#include "cuda/ptx/shared.cuh"
#include "cuda/tile/accumulator.cuh"
#include "cuda/tile/operands.cuh"
#include "hopper_units.h"

namespace jax_flash {
namespace {

constexpr int kCtas = 4, kConsumers = 2, kThreads = kConsumers * kWarpgroup;
constexpr uint32_t kSums = 7;
using Sum = Accumulator<1, 8>;
using Parts = SumParts<Sum, kConsumers>;
using Weights = FragmentsA<__nv_bfloat16, 1, 4>;
using Exchange = RowExchange<Weights>;

// The CTA's shared memory, once its barriers are ready in both CTAs.
template <class Shared>
__device__ Shared& begin() {
  auto& shared = *reinterpret_cast<Shared*>(ptx::dynamic_shared_1024());
  if (threadIdx.x == 0) {
    shared.init(kConsumerWarps * ptx::kWarpArrivals);
    ptx::fence_barriers();
  }
  __syncthreads();
  ptx::sync_cluster();
  return shared;
}

// An element of a CTA's part: integers whose sums are exact.
__device__ float part(uint32_t cta, uint32_t sum, int n, int i) {
  return static_cast<float>(((cta * kSums + sum) * kThreads + threadIdx.x) * 32 + n * 4 + i);
}

// Counts the elements that differ from the sum of both parts. Each CTA in turn is late.
__global__ void __launch_bounds__(kThreads) sums(int* wrong) {
  constexpr int64_t kLate = 20000;
  auto& parts = begin<Parts>();
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
    if (differ > 0) atomicAdd(wrong, 1);
    parts.release(static_cast<int>(threadIdx.x) / kWarpgroup, use);
  }
  if (differ > 0) atomicAdd(wrong, differ);
  __syncwarp();
  ptx::sync_cluster();
}

// A word of P, and a factor, that the owner of the rows sends in a step.
__device__ uint32_t weight(uint32_t owner, uint32_t use, int k, int i) {
  return ((owner * kSums + use) * kThreads + threadIdx.x) * 16 + k * 4 + i;
}
__device__ float factor(uint32_t owner, uint32_t use, int slot) {
  return static_cast<float>(((owner * kSums + use) * kThreads + threadIdx.x / 4) * 2 + slot);
}

// Counts the elements of P and the factors that differ. Owner and partner in turn are late.
__global__ void __launch_bounds__(kThreads) rows(int* wrong) {
  constexpr int64_t kLate = 20000;
  auto& exchange = begin<Exchange>();
  const bool owns = threadIdx.x / kWarpgroup == ptx::cluster_rank();
  const uint32_t owner = owns ? blockIdx.x : blockIdx.x ^ 1;
  int differ = 0;
  for (uint32_t use = 0; use < kSums; ++use) {
    const int64_t start = clock64();
    while (use % 3 == (owns ? 0 : 1) && clock64() - start < kLate) continue;
    Weights p;
    float factors[Exchange::kSlots];
    for (int k = 0; k < 4; ++k)
      for (int i = 0; i < 4; ++i) p.x[0][k][i] = owns ? weight(owner, use, k, i) : 0;
    for (int slot = 0; slot < Exchange::kSlots; ++slot) factors[slot] = owns ? factor(owner, use, slot) : -1;
    if (owns) {
      exchange.send_weights<true>(p, factors, use);
    } else {
      exchange.receive_weights<true>(p, factors, use);
      exchange.release_weights<true>(p, factors, use);
    }
    for (int k = 0; k < 4; ++k)
      for (int i = 0; i < 4; ++i) differ += p.x[0][k][i] != weight(owner, use, k, i);
    for (int slot = 0; slot < Exchange::kSlots; ++slot) differ += factors[slot] != factor(owner, use, slot);
  }
  if (differ > 0) atomicAdd(wrong, differ);
  __syncwarp();
  ptx::sync_cluster();
}

template <class Shared>
int run(void (*kernel)(int*), const char* name) {
  int *counter, wrong = 0;
  check(cudaMalloc(&counter, sizeof(int)), "cudaMalloc");
  check(cudaMemset(counter, 0, sizeof(int)), "memset");
  check(launch_clusters(kernel, 2, kCtas, kThreads, sizeof(Shared), nullptr, counter), name);
  check(cudaMemcpy(&wrong, counter, sizeof(int), cudaMemcpyDeviceToHost), name);
  cudaFree(counter);
  std::printf(wrong ? "%s: FAILED, %d wrong\n" : "%s: ok\n", name, wrong);
  return wrong;
}

}  // namespace

int run_sums() { return run<Parts>(sums, "SumParts") + run<Exchange>(rows, "RowExchange"); }

}  // namespace jax_flash
