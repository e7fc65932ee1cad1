// Tiles of a 16-bit bias for the sm_90a forward, by TMA.
#pragma once

#include <cstdint>

#include "cuda/hopper/pipeline.cuh"
#include "cuda/hopper/roles.cuh"
#include "cuda/hopper/tma.cuh"
#include "cuda/tensor_map.h"
#include "cuda/tile/operands.cuh"
#include "cuda/work.cuh"

namespace jax_flash {

// A 16-bit bias: a tile [64, N] for each consumer, which the load warp copies by TMA.
template <class T, int N, int Stages, int kConsumers>
struct BiasInput {
  using Tile = SharedTile<T, kConsumerRows, N>;
  static constexpr int kStages = Stages, kTileBytes = kConsumers * Tile::kBytes,
                       kBytes = kStages * kTileBytes;
  static constexpr int kWarps = 0;
  static constexpr bool kLoaded = true, kSkipsUniformTiles = false;
  static constexpr int kPanel = Tile::kPanel * 8;

  struct Map {
    CUtensorMap bias;
  };
  struct Buffer {
    alignas(1024) uint8_t bias[kStages][kConsumers][Tile::kBytes];
  };
  using Pipe = Pipeline<kStages>;

  static cudaError_t make_map(Map& map, const Problem& p) {
    return make_tensor_map(map.bias, p, p.bias,
                           {p.k_rows, p.heads, p.q_rows, p.batch, kPanel, kConsumerRows});
  }

  // The tiles of key tile n.
  template <class Shared>
  __device__ __forceinline__ static void load(Shared& shared, const Map& map, const Problem& p,
                                              const BlockWork& work, int32_t n, uint32_t use) {
    shared.input_pipe.wait_empty(use);
    const uint32_t full = shared.input_pipe.full_barrier(use);
    ptx::barrier_expect(full, kTileBytes);
    ptx::Coordinates at = shared_coordinates_of(p.bias, work, work.head, work.tile.row);
    for (int consumer = 0; consumer < kConsumers; ++consumer, at.row += kConsumerRows) {
      const uint32_t tile = ptx::shared_address(shared.bias[use % kStages][consumer]);
#pragma unroll
      for (int column = 0; column < N; column += kPanel) {
        at.column = n * N + column;
        ptx::copy_box(tile + Tile::panel_offset(column / 8), map.bias, full, at);
      }
    }
  }

  // f(x, bias) for every element x of S. The caller has waited for the tile, and releases it.
  template <class S, class Shared, class F>
  __device__ __forceinline__ static void for_each(S& s, const Shared& shared, int consumer, uint32_t use,
                                                  F f) {
    const RowsA<Tile> rows(ptx::shared_address(shared.bias[use % kStages][consumer]),
                           static_cast<int>(threadIdx.x) % 128 / 32 * 16);
#pragma unroll
    for (int k = 0; k < N / 16; ++k) {
      uint32_t pairs[4];
      rows.load(pairs, 0, k);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 bias = ptx::unpack<T>(pairs[i]);
        float &even = s.at(i % 2, 2 * k + i / 2, 0), &odd = s.at(i % 2, 2 * k + i / 2, 1);
        f(even, bias.x);
        f(odd, bias.y);
      }
    }
  }
};

}  // namespace jax_flash
