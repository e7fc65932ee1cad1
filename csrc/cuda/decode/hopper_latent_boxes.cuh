// Tiles of a latent pool by TMA: boxes of 64 columns of the rows that lie in one page and in one tile.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/decode/latent_call.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/tensor_map.h"
#include "cuda/tile/shared_tile.cuh"

namespace jax_flash::decode {

struct KeyBoxes {
  static constexpr bool kAny = true;
  CUtensorMap map;
  int32_t rows;  // of a box; 0: the pool has no boxes

  // The map of a pool for tiles of K. A box has as many rows as divide pages and tiles, and at least those of
  // TMA's swizzle.
  template <class Tile>
  cudaError_t make(const Problem& p) {
    constexpr int32_t kAtom = 8, kColumns = Tile::kPanel * kChunk<typename Tile::Element>;
    rows = Tile::kRows;
    while (rows >= kAtom && p.page_size % rows != 0) rows /= 2;
    if (rows < kAtom || p.leading.rank > 1 || p.pages == 0) rows = 0;
    if (rows == 0) return cudaSuccess;
    return make_tensor_map(map, p, p.key, {p.head_dim, p.kv_heads, p.page_size, p.pages, kColumns, rows});
  }

  // Starts to load the box that begins at a tile's row `row`, if one does, by a warp: a lane for each panel.
  // `at`: in the pool; a page outside of it becomes zeros. The barrier counts the bytes before this warp
  // arrives.
  template <class Tile>
  __device__ __forceinline__ void load(const LatentCall& call, uint32_t tile, int row, uint32_t barrier,
                                       ptx::Coordinates at) const {
    constexpr int kPanels = Tile::kChunks / Tile::kPanel;
    if (row % rows != 0) return;
    const int lane = static_cast<int>(threadIdx.x % 32);
    if (static_cast<uint32_t>(at.batch) >= static_cast<uint32_t>(call.pages)) at.batch = call.pages;
    if (lane == 0) {
      ptx::fence_async_shared();  // what was there may have come by cp.async
      ptx::barrier_expect_more(barrier, static_cast<uint32_t>(rows * Tile::kChunks * 16));
    }
    __syncwarp();
    at.column = lane * Tile::kPanel * kChunk<typename Tile::Element>;
    if (lane < kPanels)
      ptx::copy_box(tile + Tile::offset(row, 0) + lane * Tile::kPanelBytes, map, barrier, at,
                    ptx::l2_policy(call.evicts_first));
  }
};

}  // namespace jax_flash::decode
