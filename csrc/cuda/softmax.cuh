// The online softmax: running maximum and sum of a thread's rows.
#pragma once

#include <cfloat>
#include <cmath>

#include "core/score.h"
#include "cuda/ptx/math.cuh"

namespace jax_flash {

// The reductions over a row: the four lanes that hold it.
__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// From here on rounding the shift would matter: S − m is made first.
inline constexpr float kFarShift = 1 << 20;

// Shifted by a largest score of the row so far: P = 2^(scale · s + shift) ≤ 2^kSlack. O and l are rescaled
// only where a score exceeds that, which is rare after the first tiles. `scale` turns scores into powers of
// two.
template <int kSlots>
struct OnlineSoftmax {
  static constexpr float kSlack = 8;
  static constexpr int kManyTiles = 10;    // of columns: from here on sm_90 finds maxima faster by bits
  static constexpr float kNone = FLT_MAX;  // the shift of a row that has seen no key
  float shift[kSlots];
  float l[kSlots];  // this lane's share of Σ P
  float scale;

  __device__ __forceinline__ explicit OnlineSoftmax(float scale_log2) : scale(scale_log2) {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) shift[slot] = kNone, l[slot] = 0;
  }

  // Makes the shifts fit the scores S; rescales O.
  template <class S, class O>
  __device__ __forceinline__ void fit(const S& s, O& o) {
    float largest[kSlots];
    if (__any_sync(~0u, exceeds(s, largest))) raise(largest, o);
  }

  // The same at every tile, without a vote: O is left to the caller, who multiplies its rows by alpha.
  template <class S>
  __device__ __forceinline__ void follow(const S& s, float (&alpha)[kSlots]) {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const float next =
          fminf(shift[slot], -row_max(largest_of(s, slot)) * scale);  // kNone where all is hidden
      alpha[slot] = ptx::exp2(next - shift[slot]);
      shift[slot] = next;
      l[slot] *= alpha[slot];
    }
  }

  // S → P in place, column tiles [begin, end).
  template <class S>
  __device__ __forceinline__ void exponentiate(S& s, int begin, int end) {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
#pragma unroll
      for (int n = begin; n < end; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s.at(slot, n, e);
          x = ptx::exp2(fmaf(x, scale, shift[slot]));
          l[slot] += x;
        }
      }
    }
  }

  // S → P of a tile whose rows' scores are S + of_row.
  template <class S>
  __device__ __forceinline__ void follow(S& s, float (&alpha)[kSlots], const float (&of_row)[kSlots]) {
    float before[kSlots], within[kSlots];
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      before[slot] = shift[slot];
      within[slot] = shift[slot] += of_row[slot];
    }
    follow(s, alpha);
    exponentiate(s, 0, S::kColumnTiles);
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot)
      shift[slot] = shift[slot] == within[slot] ? before[slot] : shift[slot] - of_row[slot];
  }

  // Scores within [−bound, bound]: P = e^(s − bound), or more where that might be less than e^−80.
  __device__ __forceinline__ void bound(float largest) {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) shift[slot] = -kLog2e * fminf(largest, 80 - largest);
  }
  // S, shifted → P.
  template <class S>
  __device__ __forceinline__ void exponentiate_shifted(S& s) {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot)
#pragma unroll
      for (int n = 0; n < S::kColumnTiles; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s.at(slot, n, e);
          x = ptx::exp2(x);
          l[slot] += x;
        }
  }
  // Rows that have seen no key.
  __device__ __forceinline__ void forget_empty() {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot)
      if (row_sum(l[slot]) == 0) shift[slot] = kNone;
  }

  // What a row's accumulator is multiplied by, and its lse. `sink` is a logit that joins the sum only, −inf:
  // none.
  struct Final {
    float factor, lse;
  };
  __device__ __forceinline__ Final finish(int slot, float sink) const {
    return finish(slot, shift[slot] == kNone ? -INFINITY : -shift[slot], sink);
  }

 protected:
  // Over the row's largest score, as a power of two.
  __device__ __forceinline__ Final finish(int slot, float top, float sink) const {
    const float sum = row_sum(l[slot]), sink_log2 = sink * kLog2e;
    const float largest = fmaxf(top, sink_log2);
    const float alpha = ptx::exp2(top - largest);
    const float total = fmaf(sum, alpha, ptx::exp2(sink_log2 - largest));
    const bool none = largest == -INFINITY && sum == 0;  // a NaN alone has no maximum
    return {none ? 0 : alpha * ptx::reciprocal(total),
            none ? -INFINITY : (largest + ptx::log2(total)) * kLn2};
  }

  // Of a thread's share of its rows.
  template <class S>
  __device__ __forceinline__ static void find_largest(const S& s, float (&largest)[kSlots]) {
    if constexpr (S::kColumnTiles >= kManyTiles) {
      largest_by_bits(s, largest);
    } else {
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) largest[slot] = largest_of(s, slot);
    }
  }

  template <class S>
  __device__ __forceinline__ static float largest_of(const S& s, int slot) {
    float even = s.at(slot, 0, 0), odd = s.at(slot, 0, 1);
#pragma unroll
    for (int n = 1; n < S::kColumnTiles; ++n)
      even = fmaxf(even, s.at(slot, n, 0)), odd = fmaxf(odd, s.at(slot, n, 1));
    return fmaxf(even, odd);
  }

  // Floats that are not all negative are in the order of their bits as whole numbers, of which one
  // instruction of sm_90 compares three; negative ones are in the opposite order. A NaN may hide what else
  // the lane holds of its row, which is NaN in any case.
  template <class S>
  __device__ __forceinline__ static void largest_by_bits(const S& s, float (&largest)[kSlots]) {
    const auto bits = [&](int slot, int i) { return __float_as_int(s.at(slot, i / 2, i % 2)); };
    int top[kSlots], all = 0;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      top[slot] = max(bits(slot, 0), bits(slot, 1));
#pragma unroll
      for (int i = 2; i < 2 * S::kColumnTiles; i += 2)
        top[slot] = ptx::max3(top[slot], bits(slot, i), bits(slot, i + 1));
      all |= top[slot];
    }
    if (__any_sync(~0u, all < 0)) {
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
        int least = top[slot];
#pragma unroll
        for (int i = 0; i < 2 * S::kColumnTiles; i += 2)
          least = ptx::min3(least, bits(slot, i), bits(slot, i + 1));
        if (top[slot] < 0) top[slot] = least;
      }
    }
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) largest[slot] = __int_as_float(top[slot]);
  }

  // The same; whether one is above what the shifts are made for.
  template <class S>
  __device__ __forceinline__ bool exceeds(const S& s, float (&largest)[kSlots]) const {
    bool above = false;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      largest[slot] = largest_of(s, slot);
      above |= fmaf(largest[slot], scale, shift[slot]) > kSlack;
    }
    return above;
  }

 private:
  template <class O>
  __device__ __forceinline__ void raise(const float (&largest)[kSlots], O& o) {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const float top = row_max(largest[slot]);
      // Row by row, so that none depends on its neighbours.
      const float next = fmaf(top, scale, shift[slot]) > kSlack ? -top * scale : shift[slot];
      const float alpha = ptx::exp2(next - shift[slot]);
      shift[slot] = next;
      l[slot] *= alpha;
      o.scale_row(slot, alpha);
    }
  }
};

// The same over scores that may lie anywhere: S − m is made where it is far. M: volatile float where m is
// seldom asked for and registers are few.
template <int kSlots, class M>
struct FarSoftmax : OnlineSoftmax<kSlots> {
  using Base = OnlineSoftmax<kSlots>;
  using Base::l, Base::scale, Base::shift;
  M m[kSlots];
  bool far = false;  // some shift is 0 instead of −scale · m

  __device__ __forceinline__ explicit FarSoftmax(float scale_log2) : Base(scale_log2) {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) m[slot] = -Base::kNone;
  }

  template <class S, class O>
  __device__ __forceinline__ void fit(S& s, O& o) {
    float largest[kSlots];
    if (__any_sync(~0u, far | Base::exceeds(s, largest))) raise(s, largest, o);
  }

  template <class S>
  __device__ __forceinline__ void follow(S& s, float (&alpha)[kSlots]) {
    float farthest = 0, largest[kSlots];
    Base::find_largest(s, largest);
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const float before = m[slot], next = fmaxf(before, row_max(largest[slot]));
      alpha[slot] = ptx::exp2((before - next) * scale);
      m[slot] = next;
      shift[slot] = -next * scale;
      l[slot] *= alpha[slot];
      farthest = fmaxf(farthest, fabsf(shift[slot]));
    }
    if (__builtin_expect(farthest < kFarShift, true)) return;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) subtract_far(s, slot);
  }

  __device__ __forceinline__ typename Base::Final finish(int slot, float sink) const {
    return Base::finish(slot, m[slot] == -Base::kNone ? -INFINITY : m[slot] * scale, sink);
  }

 private:
  template <class S, class O>
  __device__ __forceinline__ void raise(S& s, const float (&largest)[kSlots], O& o) {
    float tops[kSlots], alpha[kSlots];
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) tops[slot] = row_max(largest[slot]);
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      alpha[slot] = far ? raise_far(slot, tops[slot]) : raise_near(slot, tops[slot]);
      l[slot] *= alpha[slot];
      o.scale_row(slot, alpha[slot]);
    }
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) far |= subtract_far(s, slot);
  }

  __device__ __forceinline__ float raise_near(int slot, float top) {
    const bool rises = fmaf(top, scale, shift[slot]) > Base::kSlack;
    const float next = rises ? -top * scale : shift[slot], alpha = ptx::exp2(next - shift[slot]);
    if (rises) m[slot] = top;
    shift[slot] = next;
    return alpha;
  }

  __device__ __forceinline__ float raise_far(int slot, float top) {
    const float before = m[slot], next = (top - before) * scale > Base::kSlack ? top : before;
    m[slot] = next;
    shift[slot] = -next * scale;
    return ptx::exp2((before - next) * scale);
  }

  template <class S>
  __device__ __forceinline__ bool subtract_far(S& s, int slot) {
    if (fabsf(shift[slot]) < kFarShift) return false;
    shift[slot] = m[slot] == -Base::kNone ? Base::kNone : 0;
    if (m[slot] == -Base::kNone) return false;
#pragma unroll
    for (int n = 0; n < S::kColumnTiles; ++n) s.at(slot, n, 0) -= m[slot], s.at(slot, n, 1) -= m[slot];
    return true;
  }
};

}  // namespace jax_flash
