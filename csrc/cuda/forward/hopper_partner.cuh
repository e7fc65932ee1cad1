// Consumer warpgroups of cuda/forward/hopper.cuh if the two CTAs of a cluster share the query tile: of the
// same rows, one CTA's consumer computes S and the softmax, and the other's is its partner, which gets P
// (hopper/row_exchange.cuh).
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
__device__ __forceinline__ bool owns_rows(const Consumer& of) {
  if constexpr (Consumer::Config::kSharers > 1)
    return static_cast<uint32_t>(of.consumer) == ptx::cluster_rank();
  return true;
}

// Sends the partner P, and at the end of a query tile 1 / Σ P.
template <class Consumer>
__device__ __forceinline__ void send_weights(Consumer& of) {
  using C = typename Consumer::Config;
  if constexpr (C::kSharers > 1)
    of.shared.exchange.template send_weights<!C::Softmax::kBounded>(of.weights, of.alpha, of.messages++);
}
template <class Consumer>
__device__ __forceinline__ void send_factors(Consumer& of) {
  if constexpr (Consumer::Config::kSharers > 1) of.shared.exchange.send_factors(of.alpha, of.messages++);
}

// O ← O + P V of the partner's columns, for all visible key tiles from the last to the first.
template <class Consumer>
__device__ __forceinline__ void attend_as_partner(Consumer& of, const Interval& tiles) {
  using C = typename Consumer::Config;
  constexpr bool kFactors = !C::Softmax::kBounded;
  auto& shared = of.shared;
  const auto& tile = *of.tile;
  if (!tiles.empty() && tiles.hi == uniform(tile.tiles.hi) && tile.last_values < C::kN)
    clear_values(of, C::kN);
  const uint32_t end = of.kv_index + tiles.size();
#pragma unroll 1
  for (; of.kv_index < end; ++of.kv_index) {
    shared.exchange.template receive_weights<kFactors>(of.weights, of.alpha, of.messages++);
    of.rescale();  // O ← α O
    ptx::hold(of.weights.x[0]);
    shared.wait_value(of.kv_index);
    of.start_values(of.kv_index);
    ptx::wgmma_wait<0>();
    ptx::hold(of.o.x[0]);
    ptx::hold(of.weights.x[0]);
    shared.release_value(of.kv_index);
  }
  shared.exchange.receive_factors(of.alpha, of.messages++);
}

}  // namespace jax_flash
