// Attention with an online softmax in one warp of decode: all query rows of the column against the keys of
// one stage after the other.
//
// Since there are few query rows, the products are transposed: Sᵀ = K Qᵀ [keys, rows] and
// Oᵀ += Vᵀ Pᵀ [dv, rows]. The rows then fill the 8 columns of mma's B instead of the 16 rows of its A.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "core/families/portable_layout.h"
#include "cuda/decode/key_scales.cuh"
#include "cuda/decode/partition.cuh"
#include "cuda/decode/row_max.cuh"
#include "cuda/decode/score_tile.cuh"
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

// The warp's state. A lane holds the query rows S::row(2 n + e) = 8 n + 2 (lane % 4) + e, for n < kTiles and
// e < 2.
template <class T, class Stored, int HeadDim, int ValueDim, int kKeys, int kTiles, int kWarps, class Score,
          bool kPageScales>
struct WarpAttention {
  using S = TransposedAccumulator<kKeys / 16, kTiles>;
  static constexpr int kSteps = HeadDim / kStepK<T>, kValueTiles = ValueDim / 16;
  static constexpr int kKeySteps = kKeys / kStepK<T>;
  static constexpr bool kScaled = sizeof(Stored) == 1;  // K = k_scale · stored, V = v_scale · stored
  // The type of the products. float8 is exact in float16, to which it is widened in half the instructions
  // that bfloat16 takes. Q must then be rescaled to float16's range.
  using M = std::conditional_t<kScaled, __half, T>;
  static constexpr bool kRescaled = !std::is_same_v<M, T>;
  using FragmentsK = KeysA<M, StoredTile<Stored, kKeys, HeadDim>, Stored>;
  using FragmentsV = ValuesA<M, StoredTile<Stored, kKeys, ValueDim>, Stored>;
  // O is rescaled only if a score exceeds the row's bound by more than kSlack. The bound is kLead below the
  // largest score, so P ≤ 2^(kSlack + kLead); float16 has few bits for smaller P.
  static constexpr float kSlack = 8, kLead = kRescaled ? 6 : 0;

  // Qᵀ as mma's B: in registers, or in shared memory if it would leave too few of them.
  static constexpr bool kSharedQueries = decode_shares_queries(8 * kTiles, HeadDim);
  uint32_t q[kSharedQueries ? 1 : kTiles][kSteps][2];
  uint2* shared_q;                   // [kTiles, kSteps, 32 lanes], and then the rows' keys and query_scale
  float o[kTiles][kValueTiles][4];   // Oᵀ
  float m[kTiles][2], l[kTiles][2];  // the bound on a row's scores, and this lane's share of Σ P
  Interval keys[kSharedQueries ? 1 : S::kSlots];  // the keys that a row sees
  Interval common;                                // the keys that all rows in use see
  float scale;                                    // S = scale · stored keys · Q
  float value_scale = 1;                          // V = value_scale · stored values
  // Scales of single pages, which S and P are multiplied by.
  KeyScales<S, kPageScales> page_scales;
  float query_scale[kSharedQueries ? 1 : kTiles][2];  // kRescaled: Q = query_scale · q, for each row of S

  __device__ __forceinline__ static int row_of(int n, int e) { return S::row(2 * n + e); }

  // Loads the operands of a segment. It leaves the sums alone, because the segment before may still use them.
  // All warps must call this together if they share the queries.
  __device__ __forceinline__ void load(const DecodeCall& call, const ColumnRows& rows,
                                       const SequenceWork& work) {
    load_queries(call, rows, work);
    common = work.band.common(rows.first_position(), work.end_position(rows));
    if (Score::kGeneral && call.ranges) common = seen_by_column(call, rows, work).all;
    if constexpr (!kSharedQueries)
      for_each_row([&](int n, int e) { keys[2 * n + e] = keys_of(call, rows, work, row_of(n, e)); });
    scale = call.scale;
    if constexpr (kScaled) {
      scale *= scale_of_all_pages(call.k_scale, rows, work);
    }
  }
  // Begins the segment's results.
  __device__ __forceinline__ void begin(const DecodeCall& call, const ColumnRows& rows,
                                        const SequenceWork& work) {
    for_each_row([&](int n, int e) { m[n][e] = -INFINITY, l[n][e] = 0; });
    clear_fragments(o);
    if constexpr (kScaled) {
      value_scale = scale_of_all_pages(call.v_scale, rows, work);
    }
  }

  // Attends to the kKeys keys from `key` on, whose tiles are at `k` and `v` in shared memory. hides: whether
  // a block mask hides some of the tile's keys from some row.
  __device__ __forceinline__ void step(const DecodeCall& call, const ColumnRows& rows,
                                       const SequenceWork& work, int32_t key, uint32_t k, uint32_t v,
                                       bool hides = false) {
    S s;
    with_format(call.kv_dtype, [&]<DType kFormat>() { multiply_keys<kFormat>(s, k); });  // Sᵀ = K Qᵀ
    if constexpr (kRescaled) for_each(s, [&](float& x, int slot, int, int) { x *= scale_of_queries(slot); });
    page_scales.scale_keys(s);
    Score().apply(s, MaskedTile<S>{{call, rows, work, key, scale, 0, hides}});  // softcap, ALiBi, masks
    if (key < common.lo || key + kKeys > common.hi) mask(s, key);
    if (call.row_max) raise_row_maxima(call, rows, work, s);
    rescale(s);  // m ← max(m, rowmax S); O ← α O, l ← α l
    uint32_t b[kTiles][kKeySteps][2];
    exponentiate(s, b);  // P = 2^(S − m); l ← l + rowsum P
    with_format(call.kv_dtype, [&]<DType kFormat>() { multiply_values<kFormat>(b, v); });  // Oᵀ ← Oᵀ + Vᵀ Pᵀ
  }

  template <class F>
  __device__ __forceinline__ static void for_each_row(F f) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) f(n, e);
  }

 private:
  // Calls f.operator()<format>(). Without float8 the format does not matter.
  template <class F>
  __device__ __forceinline__ static void with_format(DType stored, F f) {
    if constexpr (kScaled) {
      ptx::with_format(stored, f);
    } else {
      f.template operator()<DType::kF8E4M3>();
    }
  }

  // The scale that all pages share; 1 if each page has a scale.
  __device__ __forceinline__ static float scale_of_all_pages(const DecodeView& scales, const ColumnRows& rows,
                                                             const SequenceWork& work) {
    return scales && scales.batch == 0 ? *scales.at<const float>(work.leading, 0, rows.kv_head, 0) : 1;
  }

  // The keys that a row sees, and with two ranges those between them.
  __device__ __forceinline__ static Interval keys_of(const DecodeCall& call, const ColumnRows& rows,
                                                     const SequenceWork& work, int32_t row) {
    const Interval keys = row < rows.count() ? work.band.row(rows.position(row)) : Interval{0, 0};
    if (!Score::kGeneral || !call.ranges || keys.empty()) return keys;
    return seen_by_ranges(call, rows, work, row, keys).hull;
  }

  // Loads Qᵀ. Unused features become zeros.
  __device__ __forceinline__ void load_queries(const DecodeCall& call, const ColumnRows& rows,
                                               const SequenceWork& work) {
    if constexpr (kSharedQueries) {
      const int lane = lane_id();
#pragma unroll 1
      for (int n = static_cast<int>(threadIdx.x) / 32; n < kTiles; n += kWarps) {
        uint32_t tile[kSteps][2];
        const float scale_of_row = load_query_tile(call, rows, work, n, tile);
#pragma unroll
        for (int k = 0; k < kSteps; ++k)
          shared_q[(n * kSteps + k) * 32 + lane] = make_uint2(tile[k][0], tile[k][1]);
        const int row = 8 * n + lane / 4;
        if (lane % 4 == 0) row_scales()[row] = scale_of_row, row_keys()[row] = keys_of(call, rows, work, row);
      }
      __syncthreads();
    } else {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const float scale_of_row = load_query_tile(call, rows, work, n, q[n]);
        if constexpr (kRescaled) {
          const int t = static_cast<int>(threadIdx.x % 4);
#pragma unroll
          for (int e = 0; e < 2; ++e) query_scale[n][e] = __shfl_sync(~0u, scale_of_row, (2 * t + e) * 4);
        }
      }
    }
  }
  __device__ __forceinline__ Interval* row_keys() const {
    return reinterpret_cast<Interval*>(shared_q + kTiles * kSteps * 32);
  }
  __device__ __forceinline__ float* row_scales() const {
    return reinterpret_cast<float*>(row_keys() + 8 * kTiles);
  }

  // Loads 8 rows of Q, and returns the factor that this lane's row was divided by.
  __device__ __forceinline__ static float load_query_tile(const DecodeCall& call, const ColumnRows& rows,
                                                          const SequenceWork& work, int n,
                                                          uint32_t (&tile)[kSteps][2]) {
    const int g = static_cast<int>(threadIdx.x % 32 / 4), t = static_cast<int>(threadIdx.x % 4);
    const T* const at = query_at<T>(call, rows, work, 8 * n + g);
#pragma unroll
    for (int i = 0; i < 2 * kSteps; ++i) {
      const int feature = FragmentsK::feature(i / 2, i % 2, t);
      tile[i / 2][i % 2] = feature < call.head_dim ? *reinterpret_cast<const uint32_t*>(at + feature) : 0;
    }
    if constexpr (kRescaled) {
      return rescale_queries(tile);
    } else {
      return 1;
    }
  }

  // Divides a row by a power of two that brings its largest element to [1, 2), rounds to float16, and returns
  // that power.
  __device__ __forceinline__ static float rescale_queries(uint32_t (&tile)[kSteps][2]) {
    float largest = 0;
#pragma unroll
    for (int i = 0; i < 2 * kSteps; ++i) {
      const float2 x = ptx::unpack<T>(tile[i / 2][i % 2]);
      largest = fmaxf(largest, fmaxf(fabsf(x.x), fabsf(x.y)));
    }
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
    const uint32_t found = __float_as_uint(largest) >> 23;
    const uint32_t exponent = 1 <= found && found <= 253 ? found : 127;  // 1: the row is zero or not finite
    const float inverse = __uint_as_float((254 - exponent) << 23);
#pragma unroll
    for (int i = 0; i < 2 * kSteps; ++i) {
      const float2 x = ptx::unpack<T>(tile[i / 2][i % 2]);
      tile[i / 2][i % 2] = ptx::pack<M>(x.x * inverse, x.y * inverse);
    }
    return __uint_as_float(exponent << 23);
  }

  // Qᵀ as mma's B at k step k.
  __device__ __forceinline__ uint2 queries(int n, int k) const {
    if constexpr (kSharedQueries) return shared_q[(n * kSteps + k) * 32 + lane_id()];
    return make_uint2(q[kSharedQueries ? 0 : n][k][0], q[kSharedQueries ? 0 : n][k][1]);
  }
  __device__ __forceinline__ float scale_of_queries(int slot) const {
    if constexpr (kSharedQueries) return row_scales()[S::row(slot)];
    return query_scale[kSharedQueries ? 0 : slot / 2][slot % 2];
  }

  template <DType kFormat>
  __device__ __forceinline__ void multiply_keys(S& s, uint32_t k) const {
    // The odd k steps have sums of their own, so that successive products do not depend on each other.
    constexpr int kKeyTiles = kKeys / 16;
    constexpr bool kOdd = kKeyTiles * kTiles <= 2;
    S odd;
    s.clear(), odd.clear();
    const FragmentsK fragments(k);
#pragma unroll
    for (int i = 0; i < kSteps; i += FragmentsK::kAtOnce) {
#pragma unroll
      for (int m = 0; m < kKeyTiles; ++m) {
        uint32_t a[FragmentsK::kAtOnce][4];
        fragments.template load<kFormat>(a, m, i / FragmentsK::kAtOnce);
#pragma unroll
        for (int j = 0; j < FragmentsK::kAtOnce; ++j)
#pragma unroll
          for (int n = 0; n < kTiles; ++n) {
            const uint2 b = queries(n, i + j);
            ptx::mma<M>(kOdd && (i + j) % 2 ? odd.x[m][n] : s.x[m][n], a[j], b.x, b.y);
          }
      }
    }
    if constexpr (kOdd) for_each(s, [&](float& x, int slot, int n, int e) { x += odd.at(slot, n, e); });
  }

  template <DType kFormat>
  __device__ __forceinline__ void multiply_values(const uint32_t (&b)[kTiles][kKeySteps][2], uint32_t v) {
    const FragmentsV values(v);
#pragma unroll
    for (int i = 0; i < kValueTiles; i += FragmentsV::kAtOnce) {
#pragma unroll
      for (int k = 0; k < kKeySteps; ++k) {
        uint32_t a[FragmentsV::kAtOnce][4];
        values.template load<kFormat>(a, i / FragmentsV::kAtOnce, k);
#pragma unroll
        for (int j = 0; j < FragmentsV::kAtOnce; ++j)
#pragma unroll
          for (int n = 0; n < kTiles; ++n) ptx::mma<M>(o[n][i + j], a[j], b[n][k][0], b[n][k][1]);
      }
    }
  }

  __device__ __forceinline__ void mask(S& s, int32_t key) const {
    const auto seen = [&](int slot) {
      return kSharedQueries ? row_keys()[S::row(slot)] : keys[kSharedQueries ? 0 : slot];
    };
    hide(s, key, -INFINITY, [&](int slot) { return seen(slot).lo; }, BeforeLimit{});
    hide(s, key, -INFINITY, [&](int slot) { return seen(slot).hi; }, FromLimit{});
  }

  // Raises the result row_max.
  __device__ __forceinline__ static void raise_row_maxima(const DecodeCall& call, const ColumnRows& rows,
                                                          const SequenceWork& work, const S& s) {
    for_each_row([&](int n, int e) {
      const float top = column_max(thread_max(s, 2 * n + e));
      if (threadIdx.x % 32 < 4) raise_row_max(call, rows, work, row_of(n, e), top);
    });
  }

  // Raises m if a score exceeds it by more than kSlack. The warp votes on whether any row needs it, but each
  // row decides for itself, so that its bits depend on no other row.
  __device__ __forceinline__ void rescale(const S& s) {
    float largest[kTiles][2];
    bool above = false;
    for_each_row([&](int n, int e) {
      largest[n][e] = page_scales.bounded(s.at(2 * n + e, 0, 0), 0, 0);
#pragma unroll
      for (int i = 1; i < 2 * S::kColumnTiles; ++i)
        largest[n][e] =
            fmaxf(largest[n][e], page_scales.bounded(s.at(2 * n + e, i / 2, i % 2), i / 2, i % 2));
      above |= largest[n][e] > m[n][e] + (kSlack + kLead);
    });
    if (!__any_sync(~0u, above)) return;
    for_each_row([&](int n, int e) {
      const float top = column_max(largest[n][e]);
      if (!(top > m[n][e] + (kSlack + kLead))) return;
      const float alpha = ptx::exp2(m[n][e] - (top - kLead));
      m[n][e] = top - kLead;
      l[n][e] *= alpha;
#pragma unroll
      for (int v = 0; v < kValueTiles; ++v) o[n][v][e] *= alpha, o[n][v][e + 2] *= alpha;
    });
  }

  // S → P, which is rounded and transposed to mma's B.
  __device__ __forceinline__ void exponentiate(S& s, uint32_t (&b)[kTiles][kKeySteps][2]) {
    for_each(s, [&](float& x, int slot, int key_tile, int key) {
      const int n = slot / 2, e = slot % 2;
      // A row that has seen no key yet has m = −inf: P must be 0, not NaN.
      x = ptx::exp2(x - (m[n][e] == -INFINITY ? 0 : m[n][e]));
      l[n][e] += x;
      x = page_scales.scale_value(x, key_tile, key);
    });
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 2 * S::kColumnTiles; ++i) {  // each step has 8 keys
        const float even = s.at(2 * n, i / 2, i % 2), odd = s.at(2 * n + 1, i / 2, i % 2);
        if constexpr (sizeof(T) == 2) {
          b[n][i / 2][i % 2] = ptx::transpose(ptx::pack<M>(even, odd));
        } else {
          transpose(even, odd, b[n][i]);
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
