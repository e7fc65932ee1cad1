// Consumer warpgroups of cuda/forward/hopper.cuh if the two CTAs of a cluster share the query tile. For each
// block of rows, one CTA's consumer computes S and the softmax, and the other CTA's consumer is its partner,
// which receives P (hopper/row_exchange.cuh).
#pragma once

#include <cstdint>

#include "core/band.h"
#include "cuda/forward/hopper_score_tile.cuh"
#include "cuda/hopper/roles.cuh"
#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace jax_flash {

// Whether the consumer computes the softmax of its rows.
template <class Consumer>
__device__ __forceinline__ bool owns_rows(const Consumer& warpgroup) {
  if constexpr (Consumer::Config::kSharers > 1)
    return static_cast<uint32_t>(warpgroup.consumer) == ptx::cluster_rank();
  return true;
}

// Sends the partner P, and at the end of a query tile 1 / Σ P.
template <class Consumer>
__device__ __forceinline__ void send_weights(Consumer& warpgroup) {
  using C = typename Consumer::Config;
  if constexpr (C::kSharers > 1)
    warpgroup.shared.exchange.template send_weights<!C::Softmax::kBounded>(warpgroup.weights, warpgroup.alpha,
                                                                           warpgroup.messages++);
}
template <class Consumer>
__device__ __forceinline__ void send_factors(Consumer& warpgroup) {
  if constexpr (Consumer::Config::kSharers > 1)
    warpgroup.shared.exchange.send_factors(warpgroup.alpha, warpgroup.messages++);
}

// O ← O + P V of the partner's columns, for all visible key tiles from the last to the first.
template <class Consumer>
__device__ __forceinline__ void attend_as_partner(Consumer& warpgroup, const Interval& tiles) {
  using C = typename Consumer::Config;
  constexpr bool kFactors = !C::Softmax::kBounded;
  auto& shared = warpgroup.shared;
  if (!tiles.empty()) clear_values<C::kN>(warpgroup, tiles.hi - 1);
  const uint32_t end = warpgroup.kv_index + tiles.size();
#pragma unroll 1
  for (; warpgroup.kv_index < end; ++warpgroup.kv_index) {
    shared.exchange.template receive_weights<kFactors>(warpgroup.weights, warpgroup.alpha,
                                                       warpgroup.messages);
    warpgroup.rescale();  // O ← α O
    shared.exchange.template release_weights<kFactors>(warpgroup.weights, warpgroup.alpha,
                                                       warpgroup.messages++);
    ptx::hold(warpgroup.weights.x[0]);
    shared.wait_value(warpgroup.kv_index);
    warpgroup.start_values(warpgroup.kv_index);
    ptx::wgmma_wait<0>();
    ptx::hold(warpgroup.o.x[0]);
    ptx::hold(warpgroup.weights.x[0]);
    shared.release_value(warpgroup.kv_index);
  }
  shared.exchange.receive_factors(warpgroup.alpha, warpgroup.messages++);
}

}  // namespace jax_flash
