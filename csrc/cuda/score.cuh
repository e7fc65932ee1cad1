// The general score: scale, softcap, bias, alibi, segments, mask and dropout, one pass over the tile for each
// that the call has. Which it has is uniform over the grid.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <type_traits>

#include "core/band.h"
#include "core/dropout.h"
#include "core/plan.h"
#include "core/score.h"
#include "cuda/dropout.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/tile/accumulator.cuh"
#include "cuda/work.cuh"

namespace jax_flash {

// tanh to 3e-7, absolute: 1 − 2 / (1 + e^2x).
__device__ __forceinline__ float tanh_absolute(float x) {
  return fmaf(-2.0f, ptx::reciprocal(1.0f + ptx::exp2(x * (2 * kLog2e))), 1.0f);
}

// tanh to 5e-7, relative: near zero, where the difference above cancels, x (1 + x² p(x²)).
__device__ __forceinline__ float tanh_relative(float x) {
  const float square = x * x;
  float p = fmaf(1.728459201e-2f, square, -5.313979271e-2f);
  p = fmaf(fmaf(p, square, 1.332833481e-1f), square, -3.333328104e-1f);
  return fabsf(x) < 0.55f ? fmaf(x * square, p, x) : tanh_absolute(x);
}

// tanh to 3e-7, absolute, where |x| ≤ 1: x (1 + x² p(x²)), without the units of exp2, which softmax keeps
// busy.
__device__ __forceinline__ float tanh_polynomial(float x) {
  const float square = x * x;
  float p = fmaf(-2.983081620e-3f, square, 1.653281599e-2f);
  p = fmaf(fmaf(p, square, -5.142535269e-2f), square, 1.327561587e-1f);
  return fmaf(x * square, fmaf(p, square, -3.332867026e-1f), x);
}

// Keys of a tile that are of a row's own segment: of all rows alike, or not known.
enum class InSegment { kAll, kNone, kSome };

// Where one head's operands of the score lie, and the scalars among them.
struct ScoreOperands {
  const void* bias = nullptr;
  const uint8_t* mask = nullptr;
  const int32_t *q_segments = nullptr, *kv_segments = nullptr;
  float slope = 0;
  uint32_t batch = 0, head = 0;  // that dropout counts
  Dropout dropout;

  // What a kernel of this kind reads; those of one option find a bias and the keys' segments themselves.
  template <ScoreKind kKind = ScoreKind::kDropout>
  __device__ __forceinline__ void prepare(const Problem& p, const BlockWork& work, int32_t query_head) {
    constexpr bool kAll = kKind == ScoreKind::kGeneral || kKind == ScoreKind::kDropout;
    if (work.tile.index == kNoSequence) return;
    auto offset = [&](const View& view) { return work.offset(p, view, query_head, 0); };
    if (kAll && p.bias)
      bias = p.bias.as<const uint8_t>() + offset(p.bias) * (p.bias_dtype == DType::kF32 ? 4 : 2);
    if (kAll && p.mask) mask = p.mask.as<const uint8_t>() + offset(p.mask);
    if ((kAll || kKind == ScoreKind::kSegments) && p.q_segment_ids)
      q_segments = p.q_segment_ids.as<const int32_t>() + offset(p.q_segment_ids);
    if (kAll && p.kv_segment_ids)
      kv_segments = p.kv_segment_ids.as<const int32_t>() + offset(p.kv_segment_ids);
    if (const View& slopes = p.alibi_slopes; (kAll || kKind == ScoreKind::kAlibi) && slopes) {
      slope = slopes.as<const float>()[slopes.leading_offset(p.leading, work.leading) +
                                       slopes.offset(work.tile.index, query_head, 0)];
    }
    if constexpr (kKind == ScoreKind::kDropout || kKind == ScoreKind::kDropoutAlone) {
      if (p.dropout)
        dropout = make_dropout(p.spec, p.dropout, p.dropout.leading_offset(p.leading, work.leading));
      batch = static_cast<uint32_t>(work.tile.index), head = static_cast<uint32_t>(query_head);
    }
  }

  __device__ __forceinline__ TileDropout dropout_at(int32_t row, int32_t key) const {
    return {dropout, batch, head, row, key};
  }

  // Whether two neighbours of a 16-bit bias, from an even key on, are one load.
  __device__ __forceinline__ bool bias_in_pairs(const Problem& p) const {
    return p.bias_dtype != DType::kF32 && p.bias.column == 1 && p.bias.row % 2 == 0 && p.k_rows % 2 == 0 &&
           reinterpret_cast<uintptr_t>(bias) % 4 == 0;
  }

  // Whether 8 neighbours of a 16-bit bias, from a key that is a multiple of 8 on, are one load.
  __device__ __forceinline__ bool bias_in_chunks(const Problem& p) const {
    return p.bias_dtype != DType::kF32 && p.bias.column == 1 && p.bias.row % 8 == 0 && p.k_rows % 8 == 0 &&
           reinterpret_cast<uintptr_t>(bias) % 16 == 0;
  }
};

// 8 neighbours of a 16-bit bias for every row and 32 columns of a thread.
template <class S>
struct BiasChunks {
  uint4 x[S::kSlots][S::kColumnTiles / 4];

  // The pair of column tile n.
  __device__ __forceinline__ uint32_t pair(int slot, int n) const {
    const uint4& chunk = x[slot][n / 4];
    return n % 4 == 0 ? chunk.x : n % 4 == 1 ? chunk.y : n % 4 == 2 ? chunk.z : chunk.w;
  }
};

// Works on the tile of S whose warp begins at query `row` and whose keys begin at `key`, within the sequence.
// Operands are read only where row and key are in use.
class GeneralScore {
 public:
  __device__ __forceinline__ GeneralScore(const Problem& problem, const ScoreOperands& score_operands,
                                          const Band& visible)
      : p(problem), operands(score_operands), band(visible) {}

  // What is left to the softmax: the factor that turns the forward's scores into powers of two. They may lie
  // anywhere but where a cap bounds them, and then a product is to be exact: 1.
  __device__ __forceinline__ float unit() const { return p.spec.softcap > 0 && !adds() ? own_unit() : 1.0f; }

  // What apply() will add, on its way while S is made. S is permuted.
  template <class S>
  __device__ __forceinline__ void fetch(BiasChunks<S>& bias, int32_t row, int32_t key) const {
    if (!p.bias || !operands.bias_in_chunks(p)) return;
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

  // S ← log2(e) · (softcap(scale · S) + bias + alibi), −inf where segments or mask hide the key. Where there
  // is a gradient with respect to softcap's result, it becomes the one with respect to its argument. `bias`:
  // what fetch() brought. in_segment: keys that segments leave to the rows.
  template <class S>
  __device__ __forceinline__ void apply(S& s, int32_t row, int32_t key,
                                        std::type_identity_t<S>* gradient = nullptr,
                                        const BiasChunks<std::type_identity_t<S>>* bias = nullptr,
                                        InSegment in_segment = InSegment::kSome) const {
    if (p.spec.softcap > 0) {
      cap(s, gradient);
    } else {
      const float scale = p.spec.scale * kLog2e;
      for_each(s, [&](float& x, int, int, int) { x *= scale; });
    }
    add_and_hide(s, row, key, kLog2e, bias, in_segment);
  }

  // The same over unit().
  template <class S>
  __device__ __forceinline__ void apply(S& s, int32_t row, int32_t key, float unit,
                                        const BiasChunks<S>& bias) const {
    if (p.spec.softcap > 0) {
      const float inner = p.spec.scale / p.spec.softcap;
      tanh_of(s, inner, [](float& x, float t, int, int, int) { x = t; });
    } else if (!(p.spec.scale > 0)) {
      for_each(s, [&](float& x, int, int, int) { x *= p.spec.scale; });
    }
    if (unit == 1.0f) {
      const float factor = own_unit();
      for_each(s, [&](float& x, int, int, int) { x *= factor; });
    }
    add_and_hide(s, row, key, kLog2e / unit, &bias);
  }

 private:
  // A 16-bit bias with columns side by side, from this lane's first column on, and how many are in use.
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

  __device__ __forceinline__ bool adds() const { return p.bias || p.alibi_slopes; }
  __device__ __forceinline__ float own_unit() const {
    return kLog2e * (p.spec.softcap > 0 ? p.spec.softcap : p.spec.scale > 0 ? p.spec.scale : 1.0f);
  }

  // S ← S + factor · (bias + alibi), −inf where segments or mask hide the key.
  template <class S>
  __device__ __forceinline__ void add_and_hide(S& s, int32_t row, int32_t key, float factor,
                                               const BiasChunks<S>* bias,
                                               InSegment in_segment = InSegment::kSome) const {
    if (p.bias) add_bias(s, row, key, factor, bias);
    if (p.alibi_slopes) add_alibi(s, row, key, factor);
    if (p.q_segment_ids && in_segment == InSegment::kSome) hide_other_segments(s, row, key);
    if (in_segment == InSegment::kNone) for_each(s, [](float& x, int, int, int) { x = -INFINITY; });
    if (p.mask) {
      for_each_used<uint8_t>(s, operands.mask, p.mask, row, key, [](float& x, uint8_t seen) {
        if (!seen) x = -INFINITY;
      });
    }
  }

  template <class S>
  __device__ __forceinline__ void cap(S& s, S* gradient) const {
    const float c = p.spec.softcap, inner = p.spec.scale / c, outer = c * kLog2e;
    tanh_of(s, inner, [&](float& x, float t, int slot, int n, int e) {
      if (gradient) gradient->at(slot, n, e) *= 1.0f - t * t;
      x = outer * t;
    });
  }

  // f(x, tanh(inner · x), slot, n, e) for every element of this thread.
  template <class S, class F>
  __device__ __forceinline__ void tanh_of(S& s, float inner, F f) const {
    auto each = [&](auto tanh) {
      for_each(s, [&](float& x, int slot, int n, int e) { f(x, tanh(x * inner), slot, n, e); });
    };
    // The error, times c, is to stay below what 16 bits make of P.
    if (p.dtype != DType::kF32 && p.spec.softcap <= 64) {
      float largest = 0;
      for_each(s, [&](float& x, int, int, int) { largest = fmaxf(largest, fabsf(x)); });
      if (__any_sync(~0u, largest * fabsf(inner) > 1)) {
        each([](float x) { return tanh_absolute(x); });
      } else {
        each([](float x) { return tanh_polynomial(x); });
      }
    } else {
      each([](float x) { return tanh_relative(x); });
    }
  }

  // f(x, the operand's element) wherever row and key are in use. The operand is [s_q, s_k], broadcast by zero
  // strides.
  template <class T, class S, class F>
  __device__ __forceinline__ void for_each_used(S& s, const void* operand, const View& view, int32_t row,
                                                int32_t key, F f) const {
    const auto column = static_cast<int32_t>(view.column);
#pragma unroll
    for (int slot = 0; slot < S::kSlots; ++slot) {
      const int32_t i = row + S::row(slot), end = i < band.q_len ? band.k_len : 0;
      const T* from = static_cast<const T*>(operand) + i * view.row;
#pragma unroll
      for (int n = 0; n < S::kColumnTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int32_t j = key + S::column(n) + e;
          if (j < end) f(s.at(slot, n, e), from[j * column]);
        }
      }
    }
  }

  template <class T, class S>
  __device__ __forceinline__ void add_bias_of(S& s, int32_t row, int32_t key, float factor,
                                              const BiasChunks<S>* chunks) const {
    if constexpr (sizeof(T) == 2 && S::kPermuted) {
      if (chunks && operands.bias_in_chunks(p)) {
#pragma unroll
        for (int slot = 0; slot < S::kSlots; ++slot) {
#pragma unroll
          for (int n = 0; n < S::kColumnTiles; ++n) {
            const float2 bias = ptx::unpack<T>(chunks->pair(slot, n));
            s.at(slot, n, 0) = fmaf(bias.x, factor, s.at(slot, n, 0));
            s.at(slot, n, 1) = fmaf(bias.y, factor, s.at(slot, n, 1));
          }
        }
        return;
      }
    }
    if constexpr (sizeof(T) == 2 && !S::kPermuted) {
      if (operands.bias_in_pairs(p)) return add_bias_pairs<T>(s, row, key, factor);
    }
    for_each_used<T>(s, operands.bias, p.bias, row, key,
                     [=](float& x, T bias) { x = fmaf(static_cast<float>(bias), factor, x); });
  }

  // What is not in use has a bias of 0.
  template <class T, class S>
  __device__ __forceinline__ void add_bias_pairs(S& s, int32_t row, int32_t key, float factor) const {
#pragma unroll
    for (int slot = 0; slot < S::kSlots; ++slot) {
      const auto [from, left] = bias_row<S>(slot, row, key);
#pragma unroll
      for (int n = 0; n < S::kColumnTiles; ++n) {
        const int step = S::column_step(n);
        const float2 bias = ptx::unpack<T>(step < left ? *reinterpret_cast<const uint32_t*>(from + step) : 0);
        s.at(slot, n, 0) = fmaf(bias.x, factor, s.at(slot, n, 0));
        s.at(slot, n, 1) = fmaf(bias.y, factor, s.at(slot, n, 1));
      }
    }
  }

  template <class S>
  __device__ __forceinline__ void add_bias(S& s, int32_t row, int32_t key, float factor,
                                           const BiasChunks<S>* chunks) const {
    if (p.bias_dtype == DType::kF32) {
      add_bias_of<float>(s, row, key, factor, chunks);
    } else if (p.bias_dtype == DType::kF16) {
      add_bias_of<__half>(s, row, key, factor, chunks);
    } else {
      add_bias_of<__nv_bfloat16>(s, row, key, factor, chunks);
    }
  }

  template <class S>
  __device__ __forceinline__ void add_alibi(S& s, int32_t row, int32_t key, float factor) const {
    const float slope = operands.slope * factor;
#pragma unroll
    for (int slot = 0; slot < S::kSlots; ++slot) {
      const auto distance = static_cast<float>(band.diagonal(row + S::row(slot)) - key - S::column(0));
#pragma unroll
      for (int n = 0; n < S::kColumnTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int step = S::column_step(n) + e;
          s.at(slot, n, e) = fmaf(-slope, fabsf(distance - step), s.at(slot, n, e));
        }
      }
    }
  }

  template <class S>
  __device__ __forceinline__ void hide_other_segments(S& s, int32_t row, int32_t key) const {
#pragma unroll
    for (int n = 0; n < S::kColumnTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int32_t j = key + S::column(n) + e;
        const int32_t segment = j < band.k_len ? operands.kv_segments[j] : 0;
#pragma unroll
        for (int slot = 0; slot < S::kSlots; ++slot) {
          const int32_t i = row + S::row(slot);
          if (i < band.q_len && j < band.k_len && operands.q_segments[i] != segment)
            s.at(slot, n, e) = -INFINITY;
        }
      }
    }
  }

  const Problem& p;
  const ScoreOperands& operands;
  const Band& band;
};

__device__ __forceinline__ float dropout_scale(const AttentionSpec& spec) {
  return spec.has(Operand::kDropout) ? 1.0f / (1.0f - spec.dropout_rate) : 1.0f;
}

}  // namespace jax_flash
