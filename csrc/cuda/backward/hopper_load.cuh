// The producer warps of cuda/backward/hopper.cuh: operands in, sums of dQ out.
#pragma once

#include <cstdint>

#include "cuda/backward/hopper_state.cuh"
#include "cuda/backward/query_step.cuh"
#include "cuda/gradient.cuh"
#include "cuda/hopper/tma.cuh"

namespace jax_flash {

template <class C>
struct GradientProducer {
  const Problem& p;
  const typename C::Maps& maps;
  typename C::Shared& shared;

  // Calls visit(step) for the key tile's steps.
  template <class Visit>
  __device__ __forceinline__ void for_steps(Visit visit) const {
    const Interval tiles = uniform(shared.tile.tiles);
    const int32_t heads = uniform(shared.tile.heads);
    if (tiles.empty()) return;
    for (QueryStep step{0, tiles.lo}; step.head < heads; step.advance(tiles)) visit(step);
  }

  template <class Tile, class Pipe>
  __device__ __forceinline__ void load(const Pipe& pipe, uint32_t use, const uint8_t* to,
                                       const CUtensorMap& map, const ptx::Coordinates& at) const {
    pipe.wait_empty(use);
    ptx::barrier_expect(pipe.full_barrier(use), Tile::kBytes);
    load_rows<Tile>(ptx::shared_address(to), 0, map, pipe.full_barrier(use), at);
  }

  // One thread: K and Q of the first step, V and dO, then Q and dO of the others.
  __device__ __forceinline__ void load_tiles() const {
    const BlockWork& work = shared.tile.work;
    const TileWork& tile = work.tile;
    const int32_t kv_head = shared.tile.kv_head, key = tile.k_begin + tile.row;
    for_steps([&](const QueryStep& step) {
      const uint32_t use = step.number, stage = use % C::kStages;
      const int32_t head = work.head + step.head, row = tile.q_begin + step.tile * C::kM;
      if (use == 0)
        load<typename C::KTile>(shared.k_pipe, 0, shared.k, maps.key,
                                coordinates_of(p.key, work, kv_head, key));
      load<typename C::QTile>(shared.q_pipe, use, shared.q[stage], maps.query,
                              coordinates_of(p.query, work, head, row));
      if (use == 0)
        load<typename C::VTile>(shared.v_pipe, 0, shared.v, maps.value,
                                coordinates_of(p.value, work, kv_head, key));
      load<typename C::DoTile>(shared.do_pipe, use, shared.d_out[stage], maps.dout,
                               coordinates_of(p.dout, work, head, row));
    });
  }

  // Q ← 0 and dO ← 0 in rows that are not in use.
  __device__ __forceinline__ void clear_queries(const QueryStep& step) const {
    const uint32_t use = step.number, stage = use % C::kStages;
    const Interval clean = uniform(shared.tile.clean);
    const int32_t row = step.tile * C::kM;
    if (clean.lo <= row && row + C::kM <= clean.hi) return;
    const Interval rows{clean.lo - row, clean.hi - row};
    const int lane = static_cast<int>(threadIdx.x % 32);
    shared.q_pipe.wait_full(use);
    clear_rows<typename C::QTile>(shared.q[stage], rows, lane, 32);
    shared.do_pipe.wait_full(use);
    clear_rows<typename C::DoTile>(shared.d_out[stage], rows, lane, 32);
    ptx::fence_async_shared();
  }

  // One warp: lse and delta. Rows that see no key get an lse that makes their P = 0.
  __device__ __forceinline__ void load_statistics() const {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const Interval seen = uniform(shared.tile.seen);
    for_steps([&](const QueryStep& step) {
      const uint32_t use = step.number, stage = use % C::kStages;
      const float* const lse = shared.tile.lse + step.head * p.lse.head;
      const float* const delta = shared.tile.delta + step.head * p.delta.head;
      float lses[C::kM / 32], deltas[C::kM / 32];  // on their way before the stage is empty
      bool coarse = false;
#pragma unroll
      for (int i = 0; i < C::kM / 32; ++i) {
        const int32_t row = step.tile * C::kM + i * 32 + lane;
        const bool used = seen.contains(row);
        lses[i] = used ? lse[row * p.lse.row] : -INFINITY;
        deltas[i] = used ? delta[row * p.delta.row] : 0;
      }
      shared.ready_pipe.wait_empty(use);
#pragma unroll
      for (int i = 0; i < C::kM / 32; ++i) {
        const float x = row_lse(lses[i]);
        shared.statistics[stage].lse[i * 32 + lane] = x;
        shared.statistics[stage].delta[i * 32 + lane] = row_delta(lses[i], deltas[i]);
        coarse |= rounds_coarsely(x);
      }
      coarse = __any_sync(~0u, coarse);
      if (lane == 0) shared.coarse[stage] = coarse;
      clear_queries(step);
      ptx::barrier_arrive_by_warp(shared.ready_pipe.full_barrier(use));
    });
  }

  // One thread for each consumer: adds its part of dQ to the accumulator.
  __device__ __forceinline__ void add_dq(int consumer) const {
    using Tile = typename C::DqTile;
    constexpr int kBox = Tile::kPanel * 4;  // columns
    const BlockWork& work = shared.tile.work;
    const auto& pipe = shared.dq_pipe[consumer];
    const uint32_t dq = ptx::shared_address(shared.dq[consumer]);
    const int32_t first_column = C::kDqByRows ? 0 : consumer * Tile::kColumns;
    for_steps([&](const QueryStep& step) {
      const int32_t row =
          work.tile.q_begin + step.tile * C::kM + (C::kDqByRows ? consumer * kConsumerRows : 0);
      ptx::Coordinates at{0, work.head + step.head, row, work.batch_row, static_cast<int32_t>(work.leading)};
      pipe.wait_full(step.number);
#pragma unroll
      for (int column = 0; column < Tile::kColumns; column += kBox) {
        at.column = first_column + column;
        ptx::reduce_add_box(maps.dquery, dq + Tile::panel_offset(column / 4), at);
      }
      ptx::bulk_commit();
      ptx::bulk_wait_read<0>();
      pipe.release_by_thread(step.number);
    });
    ptx::bulk_wait<0>();
  }
};

}  // namespace jax_flash
