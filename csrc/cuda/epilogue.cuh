// From accumulators to global memory: o and lse of a warp's rows.
#pragma once

#include "core/problem.h"
#include "cuda/ptx/math.cuh"
#include "cuda/softmax.cuh"
#include "cuda/tile/copy.cuh"
#include "cuda/work.cuh"

namespace jax_flash {

// Normalises O, and writes lse of the rows [row, end): −inf, and o = 0, for those from q_len on.
template <class O, int kSlots>
__device__ __forceinline__ void finish_rows(O& o, const OnlineSoftmax<kSlots>& softmax, const Problem& p,
                                            const BlockWork& work, int32_t row, float dropout_scale) {
  const TileWork& tile = work.tile;
  float sink = -INFINITY;
  if (p.sinks) {
    sink =
        p.sinks.as<const float>()[p.sinks.leading_offset(p.leading, work.leading) + work.head * p.sinks.head];
  }
  float* lse = p.lse.as<float>() + work.offset(p, p.lse, tile.q_begin);
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    const int32_t i = row + O::row(slot);
    auto last = softmax.finish(slot, sink);
    if (i >= tile.q_len) last = {0, -INFINITY};
    if (i < tile.end && threadIdx.x % 4 == 0) lse[i * p.lse.row] = last.lse;
#pragma unroll
    for (int n = 0; n < O::kColumnTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = o.at(slot, n, e);
        // Not 0 · x: rows past q_len may hold anything.
        x = last.factor == 0 ? 0 : x * (last.factor * dropout_scale);
      }
    }
  }
}

// Writes a warp's rows of O through its own rows of a shared tile, so that global rows are written whole.
// `row` is the warp's first row within the tile, `first` within the sequence.
template <class Tile, class T, class O>
__device__ __forceinline__ void store_rows(const O& o, uint8_t* shared, int row, const GlobalRows<T>& out,
                                           int32_t first, int32_t end) {
  constexpr int kRows = 16 * O::kRowTiles;
  const int lane = threadIdx.x % 32;
  __syncwarp();
#pragma unroll
  for (int m = 0; m < O::kRowTiles; ++m)
#pragma unroll
    for (int n = 0; n < O::kColumnTiles; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at = Tile::offset(row + 16 * m + 8 * half + lane / 4, n) + lane % 4 * 4;
        *reinterpret_cast<uint32_t*>(shared + at) =
            ptx::pack<T>(o.x[m][n][2 * half], o.x[m][n][2 * half + 1]);
      }
  __syncwarp();
  for (int at = lane; at < kRows * Tile::kChunks; at += 32) {
    const int r = at / Tile::kChunks, chunk = at % Tile::kChunks;
    if (first + r < end && chunk * 8 < out.columns) {
      const uint4 x = *reinterpret_cast<const uint4*>(shared + Tile::offset(row + r, chunk));
      *reinterpret_cast<uint4*>(out.data + (first + r) * out.stride + chunk * 8) = x;
    }
  }
}

}  // namespace jax_flash
