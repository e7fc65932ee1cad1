// Tiles of the bias for sm_90a kernels, by TMA.
#pragma once

#include <cstdint>

#include "cuda/hopper/pipeline.cuh"
#include "cuda/hopper/roles.cuh"
#include "cuda/hopper/tma.cuh"
#include "cuda/load/bias_tile.cuh"
#include "cuda/tensor_map.h"
#include "cuda/tile/shared_tile.cuh"
#include "cuda/work.cuh"

namespace jax_flash {

// What TMA copies of a bias: tiles [rows of Tile, N], or one row of them.
template <class Tile>
cudaError_t make_bias_map(CUtensorMap& map, const Problem& p) {
  using Bias = typename Tile::Element;
  const bool one_row = has_one_row(p);
  return make_tensor_map(map, p, p.bias,
                         {p.k_rows, p.heads, one_row ? 1 : p.q_rows, p.batch, Tile::kPanel * kChunk<Bias>,
                          one_row ? 1 : Tile::kRows, 1, sizeof(Bias)});
}
template <class Tile>
__device__ __forceinline__ uint32_t bias_bytes(const Problem& p) {
  return has_one_row(p) ? Tile::kBytes / Tile::kRows : Tile::kBytes;
}
__device__ __forceinline__ ptx::Coordinates bias_coordinates_of(const Problem& p, const BlockWork& work,
                                                                int32_t head, int32_t row) {
  return shared_coordinates_of(p.bias, work, head, has_one_row(p) ? 0 : row);
}

// A tile [64, N] for each consumer, which the load warp copies by TMA. Bias: its element type.
template <class Bias, int N, int Stages, int kConsumers>
struct BiasInput {
  using Tile = SharedTile<Bias, kConsumerRows, N>;
  static constexpr int kStages = Stages, kBytes = kStages * kConsumers * Tile::kBytes;
  static constexpr int kWarps = 0;
  static constexpr bool kLoaded = true, kSkipsUniformTiles = false;

  struct Map {
    CUtensorMap bias;
  };
  struct Buffer {
    alignas(1024) uint8_t bias[kStages][kConsumers][Tile::kBytes];
  };
  using Pipe = Pipeline<kStages>;

  static cudaError_t make_map(Map& map, const Problem& p) { return make_bias_map<Tile>(map.bias, p); }

  // The tiles of key tile n.
  template <class Shared>
  __device__ __forceinline__ static void load(Shared& shared, const Map& map, const Problem& p,
                                              const BlockWork& work, int32_t n, uint32_t use) {
    shared.input_pipe.wait_empty(use);
    const uint32_t full = shared.input_pipe.full_barrier(use);
    const int count = has_one_row(p) ? 1 : kConsumers;
    ptx::barrier_expect(full, count * bias_bytes<Tile>(p));
    ptx::Coordinates at = bias_coordinates_of(p, work, work.head, work.tile.row);
    at.column = n * N;
    for (int consumer = 0; consumer < count; ++consumer, at.row += kConsumerRows)
      load_rows<Tile>(ptx::shared_address(shared.bias[use % kStages][consumer]), 0, map.bias, full, at);
  }

  // f(x, bias) for every element x of S. The caller has waited for the tile, and releases it.
  template <class S, class Shared, class F>
  __device__ __forceinline__ static void for_each(S& s, const Shared& shared, const Problem& p, int consumer,
                                                  uint32_t use, F f) {
    const bool one_row = has_one_row(p);
    const uint32_t tile = ptx::shared_address(shared.bias[use % kStages][one_row ? 0 : consumer]);
    for_each_bias<Tile, S>(tile, static_cast<int>(threadIdx.x) % 128 / 32 * 16, 0, one_row,
                           [&](int slot, int k, int e, float bias) { f(s.at(slot, k, e), bias); });
  }
};

}  // namespace jax_flash
