// Sums over a k dimension that is split between the two CTAs of a cluster (Design::kClusterColumns). Each
// warpgroup sends its part in float32 to shared memory of the same warpgroup of the other CTA, and adds the
// part that it receives. Addition commutes, so both CTAs have the same bits.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/hopper/pipeline.cuh"
#include "cuda/hopper/roles.cuh"
#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/ptx/tma.cuh"

namespace jax_flash {

// Sum: an Accumulator of a warp, or a TransposedAccumulator.
template <class Sum, int kConsumers>
struct SumParts {
  static constexpr uint32_t kThreadBytes = sizeof(float4), kRowBytes = kWarpgroup * kThreadBytes,
                            kTiles = std::extent_v<decltype(Sum::x), 1>, kBytes = kRowBytes * kTiles;
  alignas(16) uint8_t received[kConsumers][kBytes];  // for each column tile, a float4 of each thread
  // Full when the other CTA's part has arrived here, empty when the other CTA has read this CTA's part.
  Pipeline<1> pipe[kConsumers];

  // `releases`: the arrivals of one warpgroup.
  __device__ __forceinline__ void init(uint32_t releases) {
    for (auto& each : pipe) each.init(releases);
  }

  // sum ← sum + the other CTA's part. Both CTAs must pass the same `use`, and call release() afterwards.
  __device__ __forceinline__ void add(Sum& sum, int consumer, uint32_t use) const {
    send(sum, consumer, use);
    receive(sum, consumer, use);
  }

  // The two halves of add(), between which a caller can do other work.
  __device__ __forceinline__ void send(const Sum& sum, int consumer, uint32_t use) const {
    const Pipeline<1>& part = pipe[consumer];
    const uint32_t other = ptx::cluster_rank() ^ 1, full = part.full_barrier(use);
    const uint32_t there = ptx::address_in(own(consumer), other), full_there = ptx::address_in(full, other);
    part.wait_empty(use);
    if (thread() == 0) ptx::barrier_expect(full, kBytes);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const float (&x)[4] = sum.x[0][n];
      ptx::store_at(there + n * kRowBytes, make_float4(x[0], x[1], x[2], x[3]), full_there);
    }
  }
  __device__ __forceinline__ void receive(Sum& sum, int consumer, uint32_t use) const {
    const Pipeline<1>& part = pipe[consumer];
    const uint32_t here = own(consumer);
    part.wait_full(use);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const float4 x = ptx::load_shared_float4(here + n * kRowBytes);
      float (&to)[4] = sum.x[0][n];
      to[0] += x.x, to[1] += x.y, to[2] += x.z, to[3] += x.w;
    }
  }
  // Lets the other CTA send its next part. The caller has stored what it computed from all of `sum`, since
  // the arrival might overtake the loads (ptx::address_after()).
  __device__ __forceinline__ void release(int consumer, uint32_t use) const {
    ptx::barrier_arrive_in_by_warp(pipe[consumer].empty_barrier(use), ptx::cluster_rank() ^ 1);
  }

 private:
  __device__ __forceinline__ static uint32_t thread() {
    return static_cast<uint32_t>(ptx::thread_index()) % kWarpgroup;
  }
  // The address at which this thread receives. It is the same in both CTAs.
  __device__ __forceinline__ uint32_t own(int consumer) const {
    return ptx::shared_address(received[consumer]) + thread() * kThreadBytes;
  }
};

}  // namespace jax_flash
