// The store warp of cuda/forward/hopper.cuh: o of a query tile goes from shared memory to global memory by
// TMA while the consumers work on the next tile.
#pragma once

#include <cstdint>

#include "core/plan/launch_plan.h"
#include "cuda/hopper/pipeline.cuh"
#include "cuda/hopper/roles.cuh"
#include "cuda/hopper/tma.cuh"
#include "cuda/ptx/stmatrix.cuh"
#include "cuda/tile/operands.cuh"
#include "cuda/tile/shared_tile.cuh"

namespace jax_flash {

// o of each consumer. A stage is full when the consumer has written it, and empty when TMA has read it.
template <int kConsumers, class OTile>
struct OutputBuffer {
  struct Tiles {
    alignas(1024) uint8_t tile[kConsumers][OTile::kBytes];
  };
  struct Pipes {
    Pipeline<1> pipe[kConsumers];
    __device__ __forceinline__ void init(uint32_t arrivals) {
      for (auto& each : pipe) each.init(1, arrivals);
    }
  };
  using Map = CUtensorMap;
};
struct NoOutputBuffer {
  struct Tiles {};
  struct Pipes {
    __device__ __forceinline__ void init(uint32_t) {}
  };
  struct Map {};
};

// Whether TMA stores a consumer's rows from `row` on. TMA writes all rows of a box that lie in the operand,
// so it cannot be used where rows of another packed sequence follow.
__device__ __forceinline__ bool stores_by_tma(const Problem& p, const TileWork& tile, int32_t row) {
  return row + kConsumerRows <= tile.end || (!p.packed() && row < tile.end);
}

// Writes a warp's 16 rows of O, from `row` on, to a consumer's tile in shared memory.
template <class T, class OTile, class O>
__device__ __forceinline__ void stage_rows(const O& o, uint8_t* tile, int row) {
  const int lane = static_cast<int>(ptx::lane_index());
  const LaneAddress<OTile> at(ptx::shared_address(tile), row + lane % 16, lane / 16);
  const RegistersA<T, O> rounded{o};
#pragma unroll
  for (int k = 0; k < O::kColumnTiles / 2; ++k) {
    uint32_t x[4];
    rounded.load(x, 0, k);
    ptx::stmatrix_x4(at.at(0, 2 * k), x);
  }
  ptx::fence_async_shared();
}

// One thread runs this.
template <class C>
struct StoreWarp {
  using Tile = typename C::OTile;
  const Problem& p;
  const typename C::Maps& maps;
  typename C::Shared& shared;

  template <class State>
  __device__ __forceinline__ void store(const State& state, int consumer) const {
    const BlockWork& work = state.work;
    const int32_t row = work.tile.row + state.rows_before(consumer);
    if (!stores_by_tma(p, work.tile, row)) return;
    ptx::Coordinates at =
        coordinates_of(p.out, work, work.head + state.heads_before(consumer), work.tile.q_begin + row);
    const uint32_t from = ptx::shared_address(shared.o.tile[consumer]);
#pragma unroll
    for (int chunk = 0; chunk < Tile::kChunks; chunk += Tile::kPanel) {
      at.column = chunk * 8;
      ptx::store_box(maps.out, from + Tile::panel_offset(chunk), at);
    }
  }

  __device__ __forceinline__ void run() const {
    for (uint32_t tile_index = 0;; ++tile_index) {
      shared.state_pipe.wait_full(tile_index);
      const auto& tile = shared.tiles[tile_index % kTileStates];
      if (tile.done) break;
      for (int i = 0; i < C::kConsumers; ++i) {
        shared.out_pipe.pipe[i].wait_full(tile_index);
        store(tile, i);
        ptx::bulk_commit();
      }
      ptx::bulk_wait_read<0>();
      for (auto& pipe : shared.out_pipe.pipe) pipe.release_by_thread(tile_index);
      shared.state_pipe.release_by_thread(tile_index);
    }
    ptx::bulk_wait<0>();
  }
};

}  // namespace jax_flash
