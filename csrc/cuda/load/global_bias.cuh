// An additive bias of any dtype and strides, loaded from global memory.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/band.h"
#include "cuda/ptx/math.cuh"
#include "cuda/score/bias.cuh"
#include "cuda/score/operands.cuh"

namespace jax_flash {

// A thread's part of a tile of a 16-bit bias, for S in which it holds 8 adjacent columns of every 32: one
// 16-byte load per 32 columns.
template <class S>
struct BiasChunks {
  uint4 x[S::kSlots][S::kColumnTiles / 4];

  // The two elements of column tile n.
  __device__ __forceinline__ uint32_t pair(int slot, int n) const {
    const uint4& chunk = x[slot][n / 4];
    return n % 4 == 0 ? chunk.x : n % 4 == 1 ? chunk.y : n % 4 == 2 ? chunk.z : chunk.w;
  }
};

// The bias of the tile of S whose warp begins at query `row` and whose keys begin at `key`, within the
// sequence. T: the call's dtype. Only a bias of that dtype, if it has 16 bits, is read in pairs or chunks.
template <class T>
class GlobalBias {
 public:
  __device__ __forceinline__ GlobalBias(const Problem& problem, const ScoreOperands& score_operands,
                                        const Band& visible)
      : p(problem), operands(score_operands), band(visible) {}

  // Loads the operands of add(), while the tensor cores compute S.
  template <class S>
  __device__ __forceinline__ void fetch(BiasChunks<S>& bias, int32_t row, int32_t key) const {
    if constexpr (sizeof(T) > 2) return;
    if (!p.bias || p.bias_dtype != p.dtype || !operands.bias_in_chunks(p)) return;
#pragma unroll
    for (int slot = 0; slot < S::kSlots; ++slot) {
      const auto [from, left] = bias_row<S>(slot, row, key);
#pragma unroll
      for (int n = 0; n < S::kColumnTiles; n += 4) {
        bias.x[slot][n / 4] = uint4{};
        if (8 * n < left) bias.x[slot][n / 4] = *reinterpret_cast<const uint4*>(from + 8 * n);
      }
    }
  }

  // S ← S + factor · bias. `chunks`: the elements that fetch() loaded, if S is permuted.
  template <class S, class Chunks>
  __device__ __forceinline__ void add(S& s, int32_t row, int32_t key, float factor,
                                      const Chunks& chunks) const {
    static_assert(S::kPairs);
    if constexpr (sizeof(T) == 2) {
      if (p.bias_dtype == p.dtype && (S::kPermuted ? operands.bias_in_chunks(p) : operands.bias_in_pairs(p)))
        return add_pairs(s, row, key, factor, chunks);
    }
    if (p.bias_dtype == DType::kF32)
      return for_each_used<float>(s, operands.bias, p.bias, band, row, key,
                                  [=](float& x, float bias) { add_bias(x, bias, factor); });
    // One loop for both other types, because this code is long and seldom used.
    const bool half = p.bias_dtype == DType::kF16;
    for_each_used<uint16_t>(s, operands.bias, p.bias, band, row, key, [=](float& x, uint32_t bias) {
      add_bias(x, half ? ptx::unpack<__half>(bias).x : ptx::unpack<__nv_bfloat16>(bias).x, factor);
    });
  }

 private:
  // A row of a 16-bit bias whose columns are adjacent, from the lane's first column on; `left` columns of it
  // are in use.
  struct BiasRow {
    const uint16_t* from;
    int32_t left;
  };
  template <class S>
  __device__ __forceinline__ BiasRow bias_row(int slot, int32_t row, int32_t key) const {
    const int32_t i = row + S::row(slot), column = key + S::column(0);
    return {static_cast<const uint16_t*>(operands.bias) + i * p.bias.row + column,
            i < band.q_len ? band.k_len - column : 0};
  }

  // Unused elements have a bias of 0.
  template <class S, class Chunks>
  __device__ __forceinline__ void add_pairs(S& s, int32_t row, int32_t key, float factor,
                                            const Chunks& chunks) const {
#pragma unroll
    for (int slot = 0; slot < S::kSlots; ++slot) {
      const auto [from, left] = bias_row<S>(slot, row, key);
#pragma unroll
      for (int n = 0; n < S::kColumnTiles; ++n) {
        uint32_t pair;
        if constexpr (S::kPermuted) {
          pair = chunks.pair(slot, n);
        } else {
          const int step = S::column_step(n);
          pair = step < left ? *reinterpret_cast<const uint32_t*>(from + step) : 0;
        }
        const float2 bias = ptx::unpack<T>(pair);
        add_bias(s.at(slot, n, 0), bias.x, factor);
        add_bias(s.at(slot, n, 1), bias.y, factor);
      }
    }
  }

  const Problem& p;
  const ScoreOperands& operands;
  const Band& band;
};

}  // namespace jax_flash
