// dQ of calls whose keys lie in one tile: the CTA that has it rounds and stores dQ, so that no other kernel
// clears or rounds sums.
#pragma once

#include <cstdint>

#include "cuda/backward/hopper_sums.cuh"
#include "cuda/epilogue.cuh"
#include "cuda/hopper/roles.cuh"
#include "cuda/tile/copy.cuh"

namespace jax_flash {

// Stores a step's dQ. `sum`: the index of its query tile among those of the group.
template <class Consumer>
__device__ __forceinline__ void store_dq(Consumer& of, int32_t sum) {
  using C = typename Consumer::Config;
  using T = typename C::Element;
  const Problem& p = of.p;
  Placement at = dq_placement<C>(of.consumer);
  at.row += Consumer::warp_row();
  if (C::kTakes96Queries && at.row >= C::kM) return;
  const int32_t tiles = of.grid.sums.tiles;
  const int32_t head = sum < tiles ? 0 : static_cast<uint32_t>(sum) / static_cast<uint32_t>(tiles);
  for_each(of.dq, [&](float& x, int, int, int) { x *= p.spec.scale; });  // dQ ← scale · dQ
  GlobalRows<T> rows = of.tile().dq.rows;
  rows.data += head * p.head_dim + at.column;
  rows.columns = min(p.head_dim - at.column, C::kDqColumns);
  store_rows_from_registers(of.dq, rows, (sum - head * tiles) * C::kM + at.row, p.q_rows);
}

// dQ ← 0 in the rows of query tiles that see no key.
template <class Consumer>
__device__ __forceinline__ void clear_unseen_dq(const Consumer& of) {
  using C = typename Consumer::Config;
  using T = typename C::Element;
  const auto walk = steps_of(of.tile().walk);
  const int32_t q_rows = of.p.q_rows, chunks = walk.heads * of.p.head_dim / kChunk<T>;
  const Interval seen{walk.tiles.lo * C::kM, min(walk.tiles.hi * C::kM, q_rows)};
  if (seen.lo <= 0 && seen.hi == q_rows) return;
  const GlobalRows<T> rows = of.tile().dq.rows;
#pragma unroll 1
  for (int32_t row = of.warp_index(); row < q_rows; row += C::kConsumers * kConsumerWarps) {
    if (seen.contains(row)) continue;
    auto* const to = reinterpret_cast<uint4*>(rows.data + row * rows.stride);
    for (auto i = static_cast<int32_t>(Consumer::lane()); i < chunks; i += 32) to[i] = uint4{};
  }
}

}  // namespace jax_flash
