// Merges the online softmax of a block's warps, which have attended to different keys, through shared memory.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/decode/results.cuh"
#include "cuda/decode/warp_attention.cuh"

namespace jax_flash::decode {

// C: DecodeShares. O goes through shared memory a few columns at a time (DecodeLayout); twice as many columns
// if half of the rows are in use.
template <class C>
class WarpMerge {
 public:
  using Factors = float[C::kRows / 8][2];

  __device__ __forceinline__ explicit WarpMerge(uint8_t* shared)
      : o_(reinterpret_cast<float*>(shared + C::kLayout.merge_o)),
        softmax_(reinterpret_cast<Softmax*>(shared + C::kLayout.merge_softmax)) {}

  // All threads must call this. It calls write(row, feature, O of four features, softmax of the row) for
  // every row.
  template <class Write>
  __device__ __forceinline__ void run(typename C::WarpState& state, int32_t rows, Write write) {
    share_softmax(state);
    Factors factor;
    C::WarpState::for_each_row([&](int n, int e) {
      factor[n][e] = merge_weight({state.m[n][e], state.l[n][e]}, merged(C::WarpState::row_of(n, e)).m);
      if constexpr (C::WarpState::kScaled) factor[n][e] *= state.value_scale;
    });
    if constexpr (C::kValueDim % (2 * C::kMergeColumns) == 0) {
      if (rows <= C::kRows / 2) return merge<C::kRows / 2, 2 * C::kMergeColumns>(state, factor, rows, write);
    }
    merge<C::kRows, C::kMergeColumns>(state, factor, rows, write);
  }

 private:
  // kRows: upper bound of the rows in use.
  template <int kRows, int kColumns, class Write>
  __device__ __forceinline__ void merge(const typename C::WarpState& state, const Factors& factor,
                                        int32_t rows, Write write) {
    static_assert(kRows * (kColumns + 4) <= C::kRows * C::kMergePitch);
#pragma unroll 1
    for (int first = 0; first < C::kValueDim; first += kColumns) {
#pragma unroll
      for (int i = 0; i < C::kValueDim; i += kColumns) {
        if (i == first) store<kRows, kColumns>(state, factor, i);  // registers need compile-time indices
      }
      __syncthreads();
      for (int at = static_cast<int>(threadIdx.x); at < rows * (kColumns / 4); at += C::kThreads) {
        const int row = at / (kColumns / 4), column = at % (kColumns / 4) * 4;
        write(row, first + column, sum<kRows, kColumns>(row, column), merged(row));
      }
      __syncthreads();
    }
  }
  __device__ __forceinline__ static int warp() { return static_cast<int>(threadIdx.x / 32); }

  // Stores this warp's m and l of each row. Afterwards all lanes of a column have its whole l.
  __device__ __forceinline__ void share_softmax(typename C::WarpState& state) {
    C::WarpState::for_each_row([&](int n, int e) {
      state.l[n][e] = column_sum(state.l[n][e]);
      if (threadIdx.x % 32 < 4) {
        softmax_[warp() * C::kRows + C::WarpState::row_of(n, e)] = {state.m[n][e], state.l[n][e]};
      }
    });
    __syncthreads();
  }
  // m = max m_w and l = Σ 2^(m_w − m) l_w over the warps w.
  __device__ __forceinline__ Softmax merged(int row) const {
    Softmax all{-INFINITY, 0};
    for (int w = 0; w < C::kWarps; ++w) all.m = fmaxf(all.m, softmax_[w * C::kRows + row].m);
    for (int w = 0; w < C::kWarps; ++w) {
      const Softmax part = softmax_[w * C::kRows + row];
      all.l += part.l * merge_weight(part, all.m);
    }
    return all;
  }
  // Stores the kColumns features of this warp's O from `first` on, rescaled to the merged m.
  template <int kRows, int kColumns>
  __device__ __forceinline__ void store(const typename C::WarpState& state, const Factors& factor,
                                        int first) {
    const int g = static_cast<int>(threadIdx.x % 32 / 4);
    C::WarpState::for_each_row([&](int n, int e) {
      if (C::WarpState::row_of(n, e) >= kRows) return;
      float* row = o_ + (warp() * kRows + C::WarpState::row_of(n, e)) * (kColumns + 4);
#pragma unroll
      for (int v = 0; v < kColumns / 16; ++v) {
#pragma unroll
        for (int half = 0; half < 2; ++half)
          row[v * 16 + C::WarpState::FragmentsV::feature(g, half)] =
              state.o[n][first / 16 + v][e + 2 * half] * factor[n][e];
      }
    });
  }
  // O of all warps. Padded columns avoid bank conflicts.
  template <int kRows, int kColumns>
  __device__ __forceinline__ float4 sum(int row, int column) const {
    float4 total = make_float4(0, 0, 0, 0);
    for (int w = 0; w < C::kWarps; ++w) {
      const float4 x = *reinterpret_cast<const float4*>(o_ + (w * kRows + row) * (kColumns + 4) + column);
      total.x += x.x, total.y += x.y, total.z += x.z, total.w += x.w;
    }
    return total;
  }

  float* o_;
  Softmax* softmax_;
};

}  // namespace jax_flash::decode
