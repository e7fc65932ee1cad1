// The store warp of cuda/forward/hopper.cuh: o of a query tile goes from shared memory to global memory by
// TMA while the consumers work on the next tile.
#pragma once

#include <cstdint>

#include "core/plan/launch_plan.h"
#include "cuda/epilogue.cuh"
#include "cuda/hopper/pipeline.cuh"
#include "cuda/hopper/roles.cuh"
#include "cuda/hopper/tma.cuh"
#include "cuda/ptx/stmatrix.cuh"
#include "cuda/tile/operands.cuh"
#include "cuda/tile/shared_tile.cuh"

namespace jax_flash {

// o of each consumer, and who has it: full when the consumer has written it, empty when TMA has read it.
template <int kConsumers, class OTile>
struct OutputBuffer {
  struct Tiles {
    alignas(1024) uint8_t of[kConsumers][OTile::kBytes];
  };
  struct Pipes {
    Pipeline<1> of[kConsumers];
    __device__ __forceinline__ void init(uint32_t arrivals) {
      for (auto& pipe : of) pipe.init(1, arrivals);
    }
  };
  using Map = CUtensorMap;
};
// The same in the stages of V's last two tiles, which the store warp releases in place of the consumer: the
// first consumer has the earlier one. A consumer may write its stage when the other has read V there: `free`.
struct OutputInValues {
  static constexpr int kConsumers = 2;
  // The use of V whose stage a consumer has, in a query tile whose key tiles end before use `end`.
  static constexpr uint32_t kNoUse = ~0u / 2;
  __device__ __forceinline__ static uint32_t use(uint32_t end, int32_t tiles, int consumer) {
    return tiles < kConsumers ? kNoUse : end - kConsumers + consumer;
  }

  struct Tiles {};
  struct Pipes {
    Pipeline<1> of[kConsumers], free[kConsumers];
    __device__ __forceinline__ void init(uint32_t arrivals) {
      for (auto& pipe : of) pipe.init(1, arrivals);
      for (auto& pipe : free) pipe.init(1, arrivals);
    }
    // This warp of a consumer has read V of `use`.
    template <class ValuePipe>
    __device__ __forceinline__ void release_value(const ValuePipe& values, uint32_t use, uint32_t output_use,
                                                  int consumer, uint32_t tile_index) const {
      __syncwarp();
      if (!ptx::arrives_for_warp()) return;
      if (use != output_use) values.release_by_thread(use);
      if (use == output_use + 1 - 2 * consumer) free[1 - consumer].arrive(tile_index);
    }
    // Waits until this consumer may write o.
    __device__ __forceinline__ void wait_free(uint32_t output_use, int consumer, uint32_t tile_index) const {
      if (output_use == kNoUse) free[1 - consumer].arrive_by_warp(tile_index);
      free[consumer].wait_full(tile_index);
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

// Whether TMA stores a consumer's rows, from `row` on: it writes all of them, but none past the operand's.
// Behind packed sequences others follow.
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

// Leaves o of a consumer to the store warp, or stores what it cannot. `output_use`: with kStoresFromValues of
// V, whose stage takes o.
template <class Consumer>
__device__ __forceinline__ void leave_output(const Consumer& of, uint32_t output_use) {
  using C = typename Consumer::Config;
  auto& shared = of.shared;
  const TileWork& work = of.tile->work.tile;
  shared.out_pipe.of[of.consumer].wait_empty(of.tile_index);
  bool has_room = true;
  uint8_t* to;
  if constexpr (C::kStoresFromValues) {
    shared.out_pipe.wait_free(output_use, of.consumer, of.tile_index);
    has_room = output_use != OutputInValues::kNoUse;
    to = shared.v[output_use % C::kStages];
  } else {
    to = shared.o.of[of.consumer];
  }
  if (has_room && stores_by_tma(of.p, work, uniform(work.row) + of.consumer * kConsumerRows)) {
    stage_rows<typename C::Element, typename C::OTile>(of.o, to, ptx::thread_index() % 128 / 32 * 16);
  } else {
    store_rows_from_registers(of.o, of.tile->out, of.row(), work.end);
  }
  shared.out_pipe.of[of.consumer].arrive_by_warp(of.tile_index);
}

// Run by one thread.
template <class C>
struct StoreWarp {
  using Tile = typename C::OTile;
  const Problem& p;
  const typename C::Maps& maps;
  typename C::Shared& shared;

  __device__ __forceinline__ void store(const BlockWork& work, int consumer, const uint8_t* tile) const {
    const int32_t row = work.tile.row + consumer * kConsumerRows;
    if (!stores_by_tma(p, work.tile, row)) return;
    ptx::Coordinates at = coordinates_of(p.out, work, work.head, work.tile.q_begin + row);
    const uint32_t from = ptx::shared_address(tile);
#pragma unroll
    for (int chunk = 0; chunk < Tile::kChunks; chunk += Tile::kPanel) {
      at.column = chunk * 8;
      ptx::store_box(maps.out, from + Tile::panel_offset(chunk), at);
    }
  }

  // Stores o from V's stage, and releases it in place of the consumer.
  __device__ __forceinline__ void store_from_values(const BlockWork& work, int consumer, uint32_t use) const {
    if (use == OutputInValues::kNoUse) return;
    store(work, consumer, shared.v[use % C::kStages]);
    ptx::bulk_commit();
    ptx::bulk_wait_read<0>();
    for (uint32_t i = 0; i < kConsumerWarps * ptx::kWarpArrivals; ++i) shared.v_pipe.release_by_thread(use);
  }

  __device__ __forceinline__ void run() const {
    uint32_t kv_index = 0;  // key tiles so far
    for (uint32_t tile_index = 0;; ++tile_index) {
      shared.state_pipe.wait_full(tile_index);
      const auto& tile = shared.tiles[tile_index % kTileStates];
      if (tile.done) break;
      kv_index += tile.tiles.size();
      for (int i = 0; i < C::kConsumers; ++i) {
        shared.out_pipe.of[i].wait_full(tile_index);
        if constexpr (C::kStoresFromValues) {
          store_from_values(tile.work, i, OutputInValues::use(kv_index, tile.tiles.size(), i));
        } else {
          store(tile.work, i, shared.o.of[i]);
          ptx::bulk_commit();
        }
      }
      ptx::bulk_wait_read<0>();
      for (auto& pipe : shared.out_pipe.of) pipe.release_by_thread(tile_index);
      shared.state_pipe.release_by_thread(tile_index);
    }
    ptx::bulk_wait<0>();
  }
};

}  // namespace jax_flash
