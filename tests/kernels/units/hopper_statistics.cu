// Rows of float32, as the backward's lse and delta, loaded by TMA and added up in memory without tensor maps.
// Needs an sm_90 GPU.
#include <cstdio>
#include <vector>

#include "cuda/hopper/tma.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/ptx/tma.cuh"
#include "hopper_units.h"

namespace jax_flash {
namespace {

constexpr int kBlocks = 16, kThreads = 128;

// Every CTA loads its own kFloats of `from`, and adds them to the same kFloats of `sums` and, doubled, to the
// kFloats behind them: two bulk groups.
constexpr int kFloats = 132;
__global__ void __launch_bounds__(kThreads) statistics(const float* from, float* sums) {
  const uint32_t shared = ptx::shared_address(ptx::dynamic_shared_1024()), twice = shared + kFloats * 4,
                 barrier = twice + kFloats * 4;
  if (threadIdx.x == 0) {
    ptx::barrier_init(barrier, 1);
    ptx::fence_barriers();
    ptx::barrier_expect(barrier, kFloats * 4);
    load_statistics(shared, from + blockIdx.x * kFloats, kFloats, barrier);
  }
  __syncthreads();
  ptx::barrier_wait(barrier, 0);
  for (uint32_t at = threadIdx.x * 4; at < kFloats * 4; at += kThreads * 4)
    ptx::store_shared(twice + at, __float_as_uint(2 * __uint_as_float(ptx::load_shared(shared + at))));
  ptx::fence_async_shared();
  __syncthreads();
  if (threadIdx.x == 0) {
    add_floats(sums, shared, kFloats);
    ptx::bulk_commit();
    add_floats(sums + kFloats, twice, kFloats);
    ptx::bulk_commit();
    ptx::bulk_wait_read<1>();
    ptx::bulk_wait<0>();
  }
}

}  // namespace

int run_statistics() {
  std::vector<float> host(kBlocks * kFloats), want(2 * kFloats, 1.0f), got(2 * kFloats, 1.0f);
  for (int i = 0; i < kBlocks * kFloats; ++i) {
    host[i] = static_cast<float>(i * 7 % 31 - 15);
    want[i % kFloats] += host[i], want[kFloats + i % kFloats] += 2 * host[i];
  }
  float *from, *sums;
  check(cudaMalloc(&from, host.size() * 4), "cudaMalloc");
  check(cudaMalloc(&sums, got.size() * 4), "cudaMalloc");
  check(cudaMemcpy(from, host.data(), host.size() * 4, cudaMemcpyHostToDevice), "copy");
  check(cudaMemcpy(sums, got.data(), got.size() * 4, cudaMemcpyHostToDevice), "copy");
  statistics<<<kBlocks, kThreads, 2 * kFloats * 4 + ptx::kBarrierBytes>>>(from, sums);
  check(cudaMemcpy(got.data(), sums, got.size() * 4, cudaMemcpyDeviceToHost), "statistics");
  cudaFree(from), cudaFree(sums);
  View rows;
  rows.data = sums, rows.row = 1, rows.head = 4, rows.batch = 8;
  int wrong = !loads_statistics(rows, 4) || loads_statistics(rows, 2);
  rows.head = 6;
  wrong += loads_statistics(rows, 4);
  for (size_t i = 0; i < got.size(); ++i) wrong += got[i] != want[i];
  std::printf(wrong ? "load_statistics, add_floats: FAILED, %d wrong\n" : "load_statistics, add_floats: ok\n",
              wrong);
  return wrong;
}

}  // namespace jax_flash
