// Attention with an online softmax in one warp of decode: all query rows of the column against the keys of
// one stage after the other.
//
// Since there are few query rows, the products are transposed: Sᵀ = K Qᵀ [16 keys, rows] and
// Oᵀ += Vᵀ Pᵀ [dv, rows]. The rows then fill the 8 columns of mma's B instead of the 16 rows of its A.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/decode/partition.cuh"
#include "cuda/decode/stored.cuh"
#include "cuda/load/pages.cuh"
#include "cuda/mask.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/movmatrix.cuh"
#include "cuda/score/decode.cuh"
#include "cuda/tile/accumulator.cuh"
#include "cuda/tile/operands.cuh"

namespace jax_flash::decode {

// Reductions over a column of mma's C, which eight lanes hold.
__device__ __forceinline__ float column_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 4));
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 8));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 16));
}

__device__ __forceinline__ float column_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 4);
  x += __shfl_xor_sync(~0u, x, 8);
  return x + __shfl_xor_sync(~0u, x, 16);
}

// The tile of S of a column's rows and the keys from `key` on, for its score variant.
template <class S>
struct DecodeTile {
  const Problem& p;
  const ColumnRows& rows;
  const SequenceWork& work;
  int32_t key;
  float key_scale;

  __device__ __forceinline__ float scale() const { return key_scale; }
  __device__ __forceinline__ float slope(int slot) const {
    const View& slopes = p.alibi_slopes;
    return slopes.as<const float>()[slopes.leading_offset(p.leading, work.leading) +
                                    slopes.offset(work.sequence.index, rows.head(row(slot)), 0)];
  }
  __device__ __forceinline__ float distance(int slot) const {
    return static_cast<float>(work.band.diagonal(rows.position(row(slot))) - key - S::column(0));
  }

 private:
  __device__ __forceinline__ int32_t row(int slot) const { return min(S::row(slot), rows.count() - 1); }
};

// The warp's state. A lane holds the query rows S::row(2 n + e) = 8 n + 2 (lane % 4) + e, for n < kTiles and
// e < 2.
template <class T, class Stored, int HeadDim, int ValueDim, int kTiles>
struct WarpAttention {
  static constexpr int kKeys = 16;
  using S = TransposedAccumulator<kKeys / 16, kTiles>;
  using Score = DecodeScore<S>;
  static constexpr int kSteps = HeadDim / kStepK<T>, kValueTiles = ValueDim / 16;
  static constexpr int kKeySteps = kKeys / kStepK<T>;
  static constexpr bool kScaled = sizeof(Stored) == 1;  // K = k_scale · stored, V = v_scale · stored
  using FragmentsK = KeysA<T, StoredTile<Stored, kKeys, HeadDim>, Stored>;
  using FragmentsV = ValuesA<T, StoredTile<Stored, kKeys, ValueDim>, Stored>;
  static constexpr float kSlack = 8;  // O is rescaled only where a score exceeds m by more, so P ≤ 2^kSlack

  uint32_t q[kTiles][kSteps][2];     // Qᵀ as mma's B
  float o[kTiles][kValueTiles][4];   // Oᵀ
  float m[kTiles][2], l[kTiles][2];  // the bound on a row's scores, and this lane's share of Σ P
  Interval keys[S::kSlots];          // the keys that a row sees
  Interval common;                   // the keys that all rows in use see
  float scale;                       // S = scale · stored keys · Q
  float value_scale = 1;             // V = value_scale · stored values

  __device__ __forceinline__ static int row_of(int n, int e) { return S::row(2 * n + e); }

  __device__ __forceinline__ void begin(const Problem& p, const ColumnRows& rows, const SequenceWork& work) {
    common = work.band.common(rows.first_position(), work.end_position(rows));
    for_each_row([&](int n, int e) {
      const int32_t row = row_of(n, e);
      const bool used = row < rows.count();
      keys[2 * n + e] = used ? work.band.row(rows.position(row)) : Interval{0, 0};
      m[n][e] = -INFINITY;
      l[n][e] = 0;
    });
    scale = p.spec.scale;
    if constexpr (kScaled) {
      scale *= scale_of_pool(p, p.k_scale, work.leading, rows.kv_head);
      value_scale = scale_of_pool(p, p.v_scale, work.leading, rows.kv_head);
    }
    load_queries(p, rows, work);
    clear_fragments(o);
  }

  // Attends to the 16 keys from `key` on, whose tiles are at `k` and `v` in shared memory.
  __device__ __forceinline__ void step(const Problem& p, const ColumnRows& rows, const SequenceWork& work,
                                       int32_t key, uint32_t k, uint32_t v) {
    S s;
    multiply_keys(s.x[0], k, p.kv_dtype);                        // Sᵀ = K Qᵀ
    Score().apply(s, DecodeTile<S>{p, rows, work, key, scale});  // softcap, ALiBi
    if (key < common.lo || key + kKeys > common.hi) mask(s, key);
    rescale(s);  // m ← max(m, rowmax S); O ← α O, l ← α l
    uint32_t b[kTiles][kKeySteps][2];
    exponentiate(s, b);  // P = 2^(S − m); l ← l + rowsum P
    const FragmentsV values(v, p.kv_dtype);
#pragma unroll
    for (int i = 0; i < kValueTiles; i += FragmentsV::kAtOnce) {  // Oᵀ ← Oᵀ + Vᵀ Pᵀ
#pragma unroll
      for (int k_step = 0; k_step < kKeySteps; ++k_step) {
        uint32_t a[FragmentsV::kAtOnce][4];
        values.load(a, i / FragmentsV::kAtOnce, k_step);
#pragma unroll
        for (int j = 0; j < FragmentsV::kAtOnce; ++j)
#pragma unroll
          for (int n = 0; n < kTiles; ++n)
            ptx::mma_quick<T>(o[n][i + j], a[j], b[n][k_step][0], b[n][k_step][1]);
      }
    }
  }

  template <class F>
  __device__ __forceinline__ static void for_each_row(F f) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) f(n, e);
  }

 private:
  // Loads Qᵀ. Padding rows and unused features become zeros.
  __device__ __forceinline__ void load_queries(const Problem& p, const ColumnRows& rows,
                                               const SequenceWork& work) {
    const T* first = p.query.as<const T>() + p.query.leading_offset(p.leading, work.leading);
    const int g = static_cast<int>(threadIdx.x % 32 / 4), t = static_cast<int>(threadIdx.x % 4);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const int32_t row = 8 * n + g, position = rows.position(row);
      const bool used = row < rows.count() && position < work.sequence.q_len;
      const T* at =
          first + p.query.offset(work.sequence.batch_row, rows.head(row), work.sequence.q_begin + position);
#pragma unroll
      for (int i = 0; i < 2 * kSteps; ++i) {
        const int feature = FragmentsK::feature(i / 2, i % 2, t);
        const bool inside = used && feature < p.head_dim;
        q[n][i / 2][i % 2] = inside ? *reinterpret_cast<const uint32_t*>(at + feature) : 0;
      }
    }
  }

  __device__ __forceinline__ void multiply_keys(float (&s)[kTiles][4], uint32_t k, DType stored) const {
    float odd[kTiles][4] = {};  // the odd k steps, so that successive products do not depend on each other
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) s[n][i] = 0;
    const FragmentsK fragments(k, stored);
#pragma unroll
    for (int i = 0; i < kSteps; i += FragmentsK::kAtOnce) {
      uint32_t a[FragmentsK::kAtOnce][4];
      fragments.load(a, i / FragmentsK::kAtOnce);
#pragma unroll
      for (int j = 0; j < FragmentsK::kAtOnce; ++j)
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
          ptx::mma_quick<T>((i + j) % 2 ? odd[n] : s[n], a[j], q[n][i + j][0], q[n][i + j][1]);
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) s[n][i] += odd[n][i];
  }

  __device__ __forceinline__ void mask(S& s, int32_t key) const {
    hide(s, key, -INFINITY, [&](int slot) { return keys[slot].lo; }, BeforeLimit{});
    hide(s, key, -INFINITY, [&](int slot) { return keys[slot].hi; }, FromLimit{});
  }

  // Raises m where a score exceeds it by more than kSlack. The warp votes whether any row needs it, but each
  // row decides for itself, so that its bits depend on no other row.
  __device__ __forceinline__ void rescale(const S& s) {
    float largest[kTiles][2];
    bool above = false;
    for_each_row([&](int n, int e) {
      largest[n][e] = fmaxf(s.at(2 * n + e, 0, 0), s.at(2 * n + e, 0, 1));
      above |= largest[n][e] > m[n][e] + kSlack;
    });
    if (!__any_sync(~0u, above)) return;
    for_each_row([&](int n, int e) {
      const float top = column_max(largest[n][e]);
      if (!(top > m[n][e] + kSlack)) return;
      const float alpha = ptx::exp2(m[n][e] - top);
      m[n][e] = top;
      l[n][e] *= alpha;
#pragma unroll
      for (int v = 0; v < kValueTiles; ++v) o[n][v][e] *= alpha, o[n][v][e + 2] *= alpha;
    });
  }

  // S → P, which is rounded and transposed to mma's B.
  __device__ __forceinline__ void exponentiate(S& s, uint32_t (&b)[kTiles][kKeySteps][2]) {
    for_each(s, [&](float& x, int slot, int, int) {
      const int n = slot / 2, e = slot % 2;
      // A row that has seen no key yet has m = −inf: P must be 0, not NaN.
      x = ptx::exp2(x - (m[n][e] == -INFINITY ? 0 : m[n][e]));
      l[n][e] += x;
    });
    const auto& x = s.x[0];
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if constexpr (sizeof(T) == 2) {
          b[n][0][i] = ptx::transpose(ptx::pack<T>(x[n][2 * i], x[n][2 * i + 1]));
        } else {
          transpose(x[n][2 * i], x[n][2 * i + 1], b[n][i]);
        }
      }
  }

  // Transposes an 8 × 8 matrix of float32: lane (g, t) gets keys 2t and 2t + 1 of row g, ColumnsA's order of
  // k.
  __device__ __forceinline__ static void transpose(float even, float odd, uint32_t (&b)[2]) {
    const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int lane = (2 * t + i) * 4 + g / 2;
      const float x = __shfl_sync(~0u, even, lane), y = __shfl_sync(~0u, odd, lane);
      b[i] = __float_as_uint(g % 2 ? y : x);
    }
  }
};

}  // namespace jax_flash::decode
