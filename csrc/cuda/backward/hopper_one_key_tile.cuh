// Calls whose keys lie in one tile: the CTA that has it rounds and stores dQ, so that no other kernel clears
// or rounds sums. (hopper_kept_sums.cuh does so for a few tiles.)
#pragma once

#include <cstdint>

#include "cuda/backward/hopper_sums.cuh"
#include "cuda/epilogue.cuh"
#include "cuda/hopper/roles.cuh"
#include "cuda/tile/copy.cuh"
#include "cuda/work.cuh"

namespace jax_flash {

// Key tiles whose state a CTA keeps: the current one and the next. With few steps, where finding a tile takes
// longer than the steps, there are more.
template <class C>
inline constexpr int kKeyTileStates = [] {
  if constexpr (C::kStoresDq) return C::kKeepsSums || C::kTakes96Queries ? 2 : 4;
  return 2;
}();

struct NoDqRows {};  // of kernels that add dQ to sums

// The rows of dQ of a sequence, at the (first) head of `work`.
template <class T>
__device__ __forceinline__ GlobalRows<T> dq_rows(const Problem& p, const BlockWork& work) {
  const int64_t entry = work.leading * p.batch + work.batch_row, row = int64_t{p.heads} * p.head_dim;
  return {p.dquery.as<T>() + entry * p.q_rows * row + work.head * p.head_dim, row, p.head_dim};
}

// Finds the KV heads of a CTA, by one of two threads of its producers. They take turns, since finding a tile
// takes longer than a few steps.
template <class Producer>
__device__ __forceinline__ void schedule_heads(Producer& of, uint32_t count, int thread) {
  using C = typename Producer::Config;
  const uint32_t heads = reload(of.p).kv_heads, ctas = gridDim.x;
  uint32_t head = blockIdx.x + thread * ctas;
  for (of.tile_index = thread; head < count; of.tile_index += 2, head += 2 * ctas) {
    of.shared.state_pipe.wait_empty(of.tile_index);
    auto& tile = of.shared.tiles[of.tile_index % kKeyTileStates<C>];
    tile.work = fixed_work<Over::kKeys>(reload(of.p), heads, head, 0, C::kN);
    tile.walk.heads_inner = 0, tile.walk.direction = 1;
    // Calls without keys have no tiles.
    tile.template prepare<C>(reload(of.p), of.grid, [&of] { of.let_load(); });
    of.shared.state_pipe.arrive(of.tile_index);
  }
  of.end_tiles();
}

// Stores a step's dQ. `sum`: the index of its query tile among those of the group.
template <class Consumer>
__device__ __forceinline__ void store_dq(Consumer& of, int32_t sum) {
  using C = typename Consumer::Config;
  using T = typename C::Element;
  const Problem& p = of.p;
  const Placement at = dq_of_warp(of);
  if (C::kTakes96Queries && at.row >= C::kM) return;
  const int32_t tiles = of.grid.sums.tiles;
  const int32_t head = sum < tiles ? 0 : static_cast<uint32_t>(sum) / static_cast<uint32_t>(tiles);
  const int32_t row = (sum - head * tiles) * C::kM + at.row;
  for_each(of.dq, [&](float& x, int, int, int) { x *= p.spec.scale; });  // dQ ← scale · dQ
  // P = 0 in rows past a length, but dP is infinite where a value is.
  clear_rows_from(of.tile().band.q_len - row, of.dq);
  GlobalRows<T> rows = of.tile().dquery;
  rows.data += head * p.head_dim + at.column;
  rows.columns = min(p.head_dim - at.column, C::kDqColumns);
  store_rows_from_registers(of.dq, rows, row, p.q_rows);
}

// The query tiles that see some key of the sequence. A window of negative width shows none.
template <class C, class Tile>
__device__ __forceinline__ Interval seen_tiles(const Tile& tile) {
  if constexpr (!C::kKeepsSums) return uniform(tile.walk.tiles);
  if (tile.band.left + tile.band.right < 0) return {0, 0};
  return tiles_of(uniform(tile.seen), C::kM);
}

// dQ ← 0 in the rows of query tiles that see no key, by the first key tile's consumers.
template <class Consumer>
__device__ __forceinline__ void clear_unseen_dq(const Consumer& of) {
  using C = typename Consumer::Config;
  using T = typename C::Element;
  if (C::kKeepsSums && of.tile().work.tile.row > 0) return;
  const Interval tiles = seen_tiles<C>(of.tile());
  const int32_t q_rows = of.p.q_rows, chunks = uniform(of.tile().walk.heads) * of.p.head_dim / kChunk<T>;
  const Interval seen{tiles.lo * C::kM, min(tiles.hi * C::kM, q_rows)};
  if (seen.lo <= 0 && seen.hi == q_rows) return;
  const GlobalRows<T> rows = of.tile().dquery;
#pragma unroll 1
  for (int32_t row = of.warp_index(); row < q_rows; row += C::kConsumers * kConsumerWarps) {
    if (seen.contains(row)) continue;
    auto* const to = reinterpret_cast<uint4*>(rows.data + row * rows.stride);
    for (auto i = static_cast<int32_t>(Consumer::lane()); i < chunks; i += 32) to[i] = uint4{};
  }
}

}  // namespace jax_flash
