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
    const int32_t heads = p.heads / p.kv_heads;
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
    const int32_t kv_head = p.kv_head(work.head), key = tile.k_begin + tile.row;
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

  // One warp: lse and delta. Rows that see no key get an lse that makes their P = 0.
  __device__ __forceinline__ void load_statistics() const {
    const BlockWork& work = shared.tile.work;
    const int lane = static_cast<int>(threadIdx.x % 32);
    const Interval seen = uniform(shared.tile.seen);
    const float* lse = p.lse.as<const float>() + work.offset(p, p.lse, work.head, work.tile.q_begin);
    const float* delta = p.delta.as<const float>() + work.offset(p, p.delta, work.head, work.tile.q_begin);
    for_steps([&](const QueryStep& step) {
      const uint32_t use = step.number, stage = use % C::kStages;
      float lses[C::kM / 32], deltas[C::kM / 32];
      bool coarse = false;
#pragma unroll
      for (int i = 0; i < C::kM / 32; ++i) {
        const int32_t row = step.tile * C::kM + i * 32 + lane;
        const bool used = seen.contains(row);
        const float x = used ? lse[step.head * p.lse.head + row * p.lse.row] : -INFINITY;
        const float y = used ? delta[step.head * p.delta.head + row * p.delta.row] : 0;
        lses[i] = row_lse(x), deltas[i] = row_delta(x, y);
        coarse |= rounds_coarsely(lses[i]);
      }
      coarse = __any_sync(~0u, coarse);
      shared.q_pipe.wait_empty(use);
#pragma unroll
      for (int i = 0; i < C::kM / 32; ++i) {
        shared.statistics[stage].lse[i * 32 + lane] = lses[i];
        shared.statistics[stage].delta[i * 32 + lane] = deltas[i];
      }
      if (lane == 0) shared.coarse[stage] = coarse;
      ptx::barrier_arrive_by_warp(shared.q_pipe.full_barrier(use));
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
