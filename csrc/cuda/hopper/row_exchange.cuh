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
  static constexpr int kSlots = 2;
  static constexpr uint32_t kFactorBytes = kWarpgroup / 4 * sizeof(float2);
  alignas(16) uint8_t weights[kWeightBytes];  // of a key tile: for each k step, a float4 of each thread
  float2 factors[kWarpgroup / 4];             // one for the two rows that four lanes share
  // Full when the data have arrived here, empty when the other CTA has read what this CTA sent.
  Pipeline<1> weight_pipe;

  // `releases`: the arrivals of one warpgroup.
  __device__ __forceinline__ void init(uint32_t releases) { weight_pipe.init(releases); }

  // Sends P and, if kFactors, the factors.
  template <bool kFactors>
  __device__ __forceinline__ void send_weights(const Weights& from, const float (&factor)[kSlots],
                                               uint32_t use) const {
    const uint32_t there = in_other(weights) + thread() * kThreadBytes,
                   full = in_other(weight_pipe.full_barrier(use));
    weight_pipe.wait_empty(use);
#pragma unroll
    for (int k = 0; k < kWeightRows; ++k) {
      const uint32_t (&x)[4] = from.x[0][k];
      ptx::store_at(there + k * kRowBytes, make_uint4(x[0], x[1], x[2], x[3]), full);
    }
    if constexpr (kFactors) send_factors_to(factor, full);
  }
  // Receives both. release_weights() must follow, with the same arguments.
  template <bool kFactors>
  __device__ __forceinline__ void receive_weights(Weights& to, float (&factor)[kSlots], uint32_t use) const {
    const uint32_t here = ptx::shared_address(weights) + thread() * kThreadBytes;
    wait_full(use, kWeightBytes + (kFactors ? kFactorBytes : 0));
#pragma unroll
    for (int k = 0; k < kWeightRows; ++k) {
      const float4 x = ptx::load_shared_float4(here + k * kRowBytes);
      uint32_t (&a)[4] = to.x[0][k];
      a[0] = __float_as_uint(x.x), a[1] = __float_as_uint(x.y);
      a[2] = __float_as_uint(x.z), a[3] = __float_as_uint(x.w);
    }
    if constexpr (kFactors) read_factors(factor);
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
    send_factors_to(factor, in_other(weight_pipe.full_barrier(use)));
  }
  __device__ __forceinline__ void receive_factors(float (&factor)[kSlots], uint32_t use) const {
    wait_full(use, kFactorBytes);
    read_factors(factor);
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
  // `read`: depends on all loads.
  __device__ __forceinline__ void release(uint32_t use, uint32_t read) const {
    ptx::barrier_arrive_in_by_warp(ptx::address_after(weight_pipe.empty_barrier(use), read),
                                   ptx::cluster_rank() ^ 1);
  }
  __device__ __forceinline__ static uint32_t word_of(const float (&factor)[kSlots]) {
    return __float_as_uint(factor[0]) | __float_as_uint(factor[1]);
  }
  __device__ __forceinline__ void send_factors_to(const float (&factor)[kSlots], uint32_t full) const {
    if (thread() % 4 == 0)
      ptx::store_at(in_other(&factors[thread() / 4]), make_float2(factor[0], factor[1]), full);
  }
  __device__ __forceinline__ void read_factors(float (&factor)[kSlots]) const {
    const uint32_t here = ptx::shared_address(&factors[thread() / 4]);
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot)
      factor[slot] = __uint_as_float(ptx::load_shared(here + slot * sizeof(float)));
  }
};
struct NoRowExchange {
  __device__ __forceinline__ void init(uint32_t) {}
};

}  // namespace jax_flash
