// Merges the online softmax of a block's warps, which have attended to different keys, through shared memory.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/decode/results.cuh"
#include "cuda/decode/warp_attention.cuh"

namespace jax_flash::decode {

// C: DecodeSm80. O goes through shared memory a few columns at a time (DecodeLayout).
template <class C>
class WarpMerge {
 public:
  __device__ __forceinline__ explicit WarpMerge(uint8_t* shared)
      : o_(reinterpret_cast<float*>(shared + C::kLayout.merge_o)),
        softmax_(reinterpret_cast<Softmax*>(shared + C::kLayout.merge_softmax)) {}

  // Calls write(row, feature, O of four features, softmax of the row) for every row, by all threads.
  template <class Write>
  __device__ __forceinline__ void run(typename C::WarpState& state, int32_t rows, Write write) {
    share_softmax(state);
    float factor[C::kRows / 8][2];
    C::WarpState::for_each_row([&](int n, int e) {
      factor[n][e] = merge_weight({state.m[n][e], state.l[n][e]}, merged(C::WarpState::row_of(n, e)).m);
      if constexpr (C::WarpState::kScaled) factor[n][e] *= state.value_scale;
    });
#pragma unroll 1
    for (int first = 0; first < C::kValueDim; first += C::kMergeColumns) {
#pragma unroll
      for (int i = 0; i < C::kValueDim; i += C::kMergeColumns) {
        if (i == first) store(state, factor, i);  // registers need compile-time indices
      }
      __syncthreads();
      for (int at = static_cast<int>(threadIdx.x); at < rows * (C::kMergeColumns / 4); at += C::kThreads) {
        const int row = at / (C::kMergeColumns / 4), column = at % (C::kMergeColumns / 4) * 4;
        write(row, first + column, sum(row, column), merged(row));
      }
      __syncthreads();
    }
  }

 private:
  __device__ __forceinline__ static int warp() { return static_cast<int>(threadIdx.x / 32); }

  // Stores this warp's m and l of each row. The lanes of a column then have its whole l.
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
  // Stores the kMergeColumns features of this warp's O from `first` on, rescaled to the merged m.
  __device__ __forceinline__ void store(const typename C::WarpState& state,
                                        const float (&factor)[C::kRows / 8][2], int first) {
    const int g = static_cast<int>(threadIdx.x % 32 / 4);
    C::WarpState::for_each_row([&](int n, int e) {
      float* row = o_ + (warp() * C::kRows + C::WarpState::row_of(n, e)) * C::kMergePitch;
#pragma unroll
      for (int v = 0; v < C::kMergeColumns / 16; ++v) {
#pragma unroll
        for (int half = 0; half < 2; ++half)
          row[v * 16 + C::WarpState::FragmentsV::feature(g, half)] =
              state.o[n][first / 16 + v][e + 2 * half] * factor[n][e];
      }
    });
  }
  // O of all warps.
  __device__ __forceinline__ float4 sum(int row, int column) const {
    float4 total = make_float4(0, 0, 0, 0);
    for (int w = 0; w < C::kWarps; ++w) {
      const float4 x = *reinterpret_cast<const float4*>(o_ + (w * C::kRows + row) * C::kMergePitch + column);
      total.x += x.x, total.y += x.y, total.z += x.z, total.w += x.w;
    }
    return total;
  }

  float* o_;
  Softmax* softmax_;
};

}  // namespace jax_flash::decode
