// Accumulators spread over a warp's registers, and the two products of attention on them.
#pragma once

#include <cstdint>

#include "cuda/ptx/ldmatrix.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/tile/shared_tile.cuh"

namespace jax_flash {

// [16 · kRowTiles, 8 · kColumnTiles] float32 in mma's C layout: lane l holds, of every 16 × 8 tile, rows l /
// 4 and l / 4 + 8 and columns 2 · (l % 4) and the next. A thread's rows are counted by slot = 2 · row tile +
// half.
template <int RowTiles, int ColumnTiles>
struct Accumulator {
  static constexpr int kRowTiles = RowTiles, kColumnTiles = ColumnTiles;
  static constexpr int kSlots = 2 * RowTiles;

  float x[RowTiles][ColumnTiles][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int m = 0; m < RowTiles; ++m)
#pragma unroll
      for (int n = 0; n < ColumnTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) x[m][n][i] = 0;
  }

  // The row of a slot, and the column of an element's pair, from the start of the accumulator.
  __device__ __forceinline__ static int row(int slot) {
    return slot / 2 * 16 + slot % 2 * 8 + static_cast<int>(threadIdx.x % 32 / 4);
  }
  __device__ __forceinline__ static int column(int n) {
    return n * 8 + static_cast<int>(threadIdx.x % 4) * 2;
  }

  __device__ __forceinline__ float& at(int slot, int n, int i) { return x[slot / 2][n][slot % 2 * 2 + i]; }
};

// S = Q Kᵀ: Q [16 · row tiles, d] from `row` of its tile on, K [keys, d].
template <class T, class QTile, class KTile, class S>
__device__ __forceinline__ void mma_qk(S& s, uint32_t q, int row, uint32_t k) {
  const int lane = threadIdx.x % 32;
  const LaneAddress<QTile> q_lane(q, row + (lane & 15), lane >> 4);
  const LaneAddress<KTile> k_lane(k, (lane & 7) + (lane >> 4) * 8, lane >> 3 & 1);
  s.clear();
#pragma unroll
  for (int chunk = 0; chunk < KTile::kChunks; chunk += 2) {
    uint32_t a[S::kRowTiles][4];
#pragma unroll
    for (int m = 0; m < S::kRowTiles; ++m) ptx::ldmatrix_x4(a[m], q_lane.at(16 * m, chunk));
#pragma unroll
    for (int n = 0; n < S::kColumnTiles; n += 2) {
      uint32_t b[4];
      ptx::ldmatrix_x4(b, k_lane.at(8 * n, chunk));
#pragma unroll
      for (int m = 0; m < S::kRowTiles; ++m) {
        ptx::mma_m16n8k16<T>(s.x[m][n], a[m], b[0], b[1]);
        ptx::mma_m16n8k16<T>(s.x[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// O += P V: P in registers, rounded to T on the way (C's layout is A's), V [keys, dv].
template <class T, class VTile, class O, class P>
__device__ __forceinline__ void mma_pv(O& o, const P& p, uint32_t v) {
  const int lane = threadIdx.x % 32;
  const LaneAddress<VTile> v_lane(v, lane & 15, lane >> 4);
#pragma unroll
  for (int k = 0; k < P::kColumnTiles; k += 2) {
    uint32_t a[P::kRowTiles][4];
#pragma unroll
    for (int m = 0; m < P::kRowTiles; ++m) {
      a[m][0] = ptx::pack<T>(p.x[m][k][0], p.x[m][k][1]);
      a[m][1] = ptx::pack<T>(p.x[m][k][2], p.x[m][k][3]);
      a[m][2] = ptx::pack<T>(p.x[m][k + 1][0], p.x[m][k + 1][1]);
      a[m][3] = ptx::pack<T>(p.x[m][k + 1][2], p.x[m][k + 1][3]);
    }
#pragma unroll
    for (int n = 0; n < O::kColumnTiles; n += 2) {
      uint32_t b[4];
      ptx::ldmatrix_x4_trans(b, v_lane.at(8 * k, n));
#pragma unroll
      for (int m = 0; m < P::kRowTiles; ++m) {
        ptx::mma_m16n8k16<T>(o.x[m][n], a[m], b[0], b[1]);
        ptx::mma_m16n8k16<T>(o.x[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

}  // namespace jax_flash
