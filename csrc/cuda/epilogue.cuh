// The epilogue: o and lse of a warp's rows, from accumulators to global memory.
#pragma once

#include "core/problem.h"
#include "cuda/ptx/global.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/softmax.cuh"
#include "cuda/tile/accumulator.cuh"
#include "cuda/tile/copy.cuh"
#include "cuda/work.cuh"

namespace jax_flash {

// The location of the lse and the sinks of a sequence's rows.
struct LseRows {
  float* data;
  int64_t stride;
  const float* sinks;  // null if there are none

  __device__ __forceinline__ void prepare(const Problem& p, const BlockWork& work) {
    data = p.lse.as<float>() + work.offset(p, p.lse, work.head, work.tile.q_begin);
    stride = p.lse.row;
    sinks = nullptr;
    if (p.sinks) sinks = p.sinks.as<const float>() + work.offset(p, p.sinks, work.head, work.tile.q_begin);
  }
  // The logit of row i's sink; −inf if there is none.
  template <class Rows>
  __device__ __forceinline__ float sink(const Rows& offset, int32_t i, const TileWork& tile) const {
    return ptx::load_global(sinks + offset(i), sinks && i < tile.q_len, -INFINITY);
  }
};

// The location of a row, in elements from row 0.
struct StridedRows {
  int64_t stride;
  __device__ __forceinline__ int64_t operator()(int32_t row) const { return row * stride; }
};

// lse ← (m + log Σ P) of the rows [row, end), −inf from q_len on; factor ← dropout_scale / Σ P, for O.
template <int kSlots, class Softmax, class Rows>
__device__ __forceinline__ void finish_softmax(float (&factor)[kSlots], const Softmax& softmax,
                                               const LseRows& lse, const Rows& offset, const Rows& of_sinks,
                                               const TileWork& tile, int32_t row, float dropout_scale) {
  float sinks[kSlots];
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot)
    sinks[slot] = lse.sink(of_sinks, row + Accumulator<kSlots / 2, 1>::row(slot), tile);
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    const int32_t i = row + Accumulator<kSlots / 2, 1>::row(slot);
    auto last = softmax.finish(slot, sinks[slot]);
    if (i >= tile.q_len) last = {0, -INFINITY};
    ptx::store_global(lse.data + offset(i), last.lse, i < tile.end && threadIdx.x % 4 == 0);
    factor[slot] = last.factor * dropout_scale;
  }
}
template <int kSlots, class Softmax>
__device__ __forceinline__ void finish_softmax(float (&factor)[kSlots], const Problem& p,
                                               const Softmax& softmax, const LseRows& lse,
                                               const TileWork& tile, int32_t row, float dropout_scale) {
  finish_softmax(factor, softmax, lse, StridedRows{lse.stride}, StridedRows{p.sinks.row}, tile, row,
                 dropout_scale);
}

// O ← factor · O. Rows with factor 0 may hold NaN, and become 0.
template <class O>
__device__ __forceinline__ void normalise_rows(O& o, const float (&factor)[O::kSlots]) {
  bool none = false;
#pragma unroll
  for (int slot = 0; slot < O::kSlots; ++slot) {
    o.scale_row(slot, factor[slot]);
    none |= factor[slot] == 0;
  }
  if (!__any_sync(~0u, none)) return;
#pragma unroll
  for (int slot = 0; slot < O::kSlots; ++slot)
#pragma unroll
    for (int n = 0; n < O::kColumnTiles; ++n)
      if (factor[slot] == 0) o.at(slot, n, 0) = o.at(slot, n, 1) = 0;
}

// Stores a warp's rows of an accumulator through its own rows of a shared tile, so that stores to global
// memory are coalesced. `row`: the warp's first row within the tile; `first`: within the sequence.
template <class Tile, class T, class O>
__device__ __forceinline__ void store_rows(const O& o, uint8_t* shared, int row, const GlobalRows<T>& out,
                                           int32_t first, int32_t end) {
  __syncwarp();
  store_accumulator<Tile>(o, shared, {row, 16, 0, 16});
  __syncwarp();
  store_tile<Tile, 16 * O::kRowTiles, 32>(shared, row, out, first, end, end, threadIdx.x % 32);
}

// Transposes 4 × 4 words between the four lanes of a row: lane i gets their x[i].
__device__ __forceinline__ void transpose_quad(uint32_t (&x)[4]) {
  const int lane = threadIdx.x % 4;
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    const bool upper = lane & step;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & step) continue;
      const uint32_t other = __shfl_xor_sync(~0u, upper ? x[i] : x[i + step], step);
      if (upper) x[i] = other;
      if (!upper) x[i + step] = other;
    }
  }
}

// Stores a warp's rows without shared memory: lanes exchange pairs, so that each stores 16 bytes of a row.
template <class T, class O, class Rows>
__device__ __forceinline__ void store_rows_from_registers(const O& o, T* data, int32_t columns,
                                                          const Rows& offset, int32_t row, int32_t end) {
#pragma unroll
  for (int slot = 0; slot < O::kSlots; ++slot) {
    const int32_t i = row + O::row(slot);
    T* const to = data + offset(i);
#pragma unroll
    for (int n = 0; n < O::kColumnTiles; n += 4) {
      uint32_t x[4] = {};
#pragma unroll
      for (int c = 0; c < 4 && n + c < O::kColumnTiles; ++c)
        x[c] = ptx::pack<T>(o.at(slot, n + c, 0), o.at(slot, n + c, 1));
      transpose_quad(x);
      const int32_t column = n * 8 + threadIdx.x % 4 * 8;
      ptx::store_global(to + column, make_uint4(x[0], x[1], x[2], x[3]), i < end && column < columns);
    }
  }
}
template <class T, class O>
__device__ __forceinline__ void store_rows_from_registers(const O& o, const GlobalRows<T> out, int32_t row,
                                                          int32_t end) {
  store_rows_from_registers(o, out.data, out.columns, StridedRows{out.stride}, row, end);
}

// The same for gradients, which are float32 if `in_floats`: then `out` counts in T, of which a float has two.
template <class T, class O>
__device__ __forceinline__ void store_gradient_rows(const O& o, const GlobalRows<T> out, int32_t row,
                                                    int32_t end, bool in_floats) {
  static_assert(2 * sizeof(T) == sizeof(float));
  if (!in_floats) return store_rows_from_registers(o, out, row, end);
  const int32_t first = static_cast<int32_t>(threadIdx.x % 4 * 2);
#pragma unroll
  for (int slot = 0; slot < O::kSlots; ++slot) {
    const int32_t i = row + O::row(slot);
    float* const to = reinterpret_cast<float*>(out.data + i * out.stride) + first;
#pragma unroll
    for (int n = 0; n < O::kColumnTiles; ++n)
      ptx::store_global(to + n * 8, make_float2(o.at(slot, n, 0), o.at(slot, n, 1)),
                        i < end && n * 8 < out.columns);
  }
}

}  // namespace jax_flash
