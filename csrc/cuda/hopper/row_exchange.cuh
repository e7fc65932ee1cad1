// The exchange between the two CTAs of a cluster that share a query tile (Design::kClusterColumns). For each
// block of 64 rows, a consumer of one CTA owns S and the softmax. Its partner is the consumer of the other
// CTA that has the same rows and other columns of O. The owner sends the partner P, rounded, with the factors
// α of O, and after the last key tile the factors 1 / Σ P.
//
// Both have the same rows in the same registers, so each thread sends to the same thread of the other CTA, by
// st.async. Each CTA has one owner and one partner.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/hopper/pipeline.cuh"
#include "cuda/hopper/roles.cuh"
#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/ptx/tma.cuh"

namespace jax_flash {

// Weights: FragmentsA of P.
template <class Weights>
struct RowExchange {
  static constexpr uint32_t kThreadBytes = sizeof(float4), kRowBytes = kWarpgroup * kThreadBytes,
                            kWeightRows = std::extent_v<decltype(Weights::x), 1>,
                            kWeightBytes = kWeightRows * kRowBytes;
  static constexpr int kWeightStages = 2, kSlots = 2;
  static constexpr uint32_t kFactorBytes = kWarpgroup / 4 * sizeof(float2);
  alignas(16) uint8_t weights[kWeightStages][kWeightBytes];  // for each k step, a float4 of each thread
  float2 factors[kWeightStages][kWarpgroup / 4];             // one for the two rows that four lanes share
  // Full when the data have arrived here, empty when the other CTA has read what this CTA sent.
  Pipeline<kWeightStages> weight_pipe;
  // The newest key tile of which this CTA's owner has S. Only the order of products depends on it.
  static constexpr uint32_t kNoScores = ~0u;  // none is being multiplied
  uint32_t scores;

  // `releases`: the arrivals of one warpgroup.
  __device__ __forceinline__ void init(uint32_t releases) {
    weight_pipe.init(releases);
    scores = kNoScores;
  }

  // The owner's softmax waits for S, so the partner in the same CTA issues P V after it: it waits until the
  // owner has S of a tile that is not `seen`, but at most kPatience cycles, since they do not work in step.
  // These accesses are relaxed, which racecheck cannot see, so its build (ptx::arrives_for_warp) has none.
  static constexpr int kPatience = 2000;
  static constexpr bool kWaitsForScores = ptx::kWarpArrivals == 1;
  __device__ __forceinline__ void publish_scores(uint32_t use) const {
    if (kWaitsForScores && thread() == 0) ptx::store_shared_relaxed(ptx::shared_address(&scores), use);
  }
  __device__ __forceinline__ void wait_for_scores(uint32_t& seen) const {
    if constexpr (!kWaitsForScores) return;
    const uint32_t at = ptx::shared_address(&scores), before = seen;
    const auto start = static_cast<uint32_t>(clock());
    do {
      seen = ptx::load_shared_relaxed(at);
    } while (seen == before && seen != kNoScores && static_cast<uint32_t>(clock()) - start < kPatience);
  }

  // Sends P and, if kFactors, the factors.
  template <bool kFactors>
  __device__ __forceinline__ void send_weights(const Weights& from, const float (&factor)[kSlots],
                                               uint32_t use) const {
    const uint32_t there = in_other(weights[use % kWeightStages]) + thread() * kThreadBytes,
                   full = in_other(weight_pipe.full_barrier(use));
    weight_pipe.wait_empty(use);
#pragma unroll
    for (int k = 0; k < kWeightRows; ++k) {
      const uint32_t (&x)[4] = from.x[0][k];
      ptx::store_at(there + k * kRowBytes, make_uint4(x[0], x[1], x[2], x[3]), full);
    }
    if constexpr (kFactors) send_factors_to(factor, use, full);
  }
  // Receives both. release_weights() must follow, with the same arguments.
  template <bool kFactors>
  __device__ __forceinline__ void receive_weights(Weights& to, float (&factor)[kSlots], uint32_t use) const {
    const uint32_t here = ptx::shared_address(weights[use % kWeightStages]) + thread() * kThreadBytes;
    wait_full(use, kWeightBytes + (kFactors ? kFactorBytes : 0));
#pragma unroll
    for (int k = 0; k < kWeightRows; ++k) {
      const float4 x = ptx::load_shared_float4(here + k * kRowBytes);
      uint32_t (&a)[4] = to.x[0][k];
      a[0] = __float_as_uint(x.x), a[1] = __float_as_uint(x.y);
      a[2] = __float_as_uint(x.z), a[3] = __float_as_uint(x.w);
    }
    if constexpr (kFactors) read_factors(factor, use);
  }
  // Lets the owner overwrite them, once the loads have returned.
  template <bool kFactors>
  __device__ __forceinline__ void release_weights(const Weights& received, const float (&factor)[kSlots],
                                                  uint32_t use) const {
    uint32_t read = kFactors ? word_of(factor) : 0;
#pragma unroll
    for (int k = 0; k < kWeightRows; ++k) read |= received.x[0][k][0];
    release(use, read);
  }

  // Sends only the factors, as one more use of P's pipeline.
  __device__ __forceinline__ void send_factors(const float (&factor)[kSlots], uint32_t use) const {
    weight_pipe.wait_empty(use);
    send_factors_to(factor, use, in_other(weight_pipe.full_barrier(use)));
  }
  __device__ __forceinline__ void receive_factors(float (&factor)[kSlots], uint32_t use) const {
    wait_full(use, kFactorBytes);
    read_factors(factor, use);
    release(use, word_of(factor));
  }

 private:
  __device__ __forceinline__ static uint32_t thread() {
    return static_cast<uint32_t>(ptx::thread_index()) % kWarpgroup;
  }
  // The same place in the other CTA.
  __device__ __forceinline__ static uint32_t in_other(uint32_t address) {
    return ptx::address_in(address, ptx::cluster_rank() ^ 1);
  }
  __device__ __forceinline__ static uint32_t in_other(const void* place) {
    return in_other(ptx::shared_address(place));
  }
  __device__ __forceinline__ void wait_full(uint32_t use, uint32_t bytes) const {
    if (thread() == 0) ptx::barrier_expect(weight_pipe.full_barrier(use), bytes);
    weight_pipe.wait_full(use);
  }
  // `read`: depends on all loads of the stage.
  __device__ __forceinline__ void release(uint32_t use, uint32_t read) const {
    ptx::barrier_arrive_in_by_warp(ptx::address_after(weight_pipe.empty_barrier(use), read),
                                   ptx::cluster_rank() ^ 1);
  }
  __device__ __forceinline__ static uint32_t word_of(const float (&factor)[kSlots]) {
    return __float_as_uint(factor[0]) | __float_as_uint(factor[1]);
  }
  __device__ __forceinline__ uint32_t factor_address(uint32_t use) const {
    return ptx::shared_address(&factors[use % kWeightStages][thread() / 4]);
  }
  __device__ __forceinline__ void send_factors_to(const float (&factor)[kSlots], uint32_t use,
                                                  uint32_t full) const {
    if (thread() % 4 == 0)
      ptx::store_at(in_other(factor_address(use)), make_float2(factor[0], factor[1]), full);
  }
  __device__ __forceinline__ void read_factors(float (&factor)[kSlots], uint32_t use) const {
    const uint32_t here = factor_address(use);
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot)
      factor[slot] = __uint_as_float(ptx::load_shared(here + slot * sizeof(float)));
  }
};
struct NoRowExchange {
  __device__ __forceinline__ void init(uint32_t) {}
};

}  // namespace jax_flash
