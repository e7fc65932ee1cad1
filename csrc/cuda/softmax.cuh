// The online softmax: running maximum and sum of a thread's rows.
#pragma once

#include <cfloat>
#include <cmath>

#include "core/score.h"
#include "cuda/ptx/math.cuh"
#include "cuda/row_result.cuh"

namespace jax_flash {

// Reductions over the four lanes that hold a row.
__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// The largest of what a thread holds of a row.
template <class S>
__device__ __forceinline__ float thread_max(const S& s, int slot) {
  float even = s.at(slot, 0, 0), odd = s.at(slot, 0, 1);
#pragma unroll
  for (int n = 1; n < S::kColumnTiles; ++n)
    even = fmaxf(even, s.at(slot, n, 0)), odd = fmaxf(odd, s.at(slot, n, 1));
  return fmaxf(even, odd);
}

// If |scale · m| is at least this, the rounding of scale · s + shift would show in P, so S − m is computed
// first.
inline constexpr float kLargeShift = 1 << 20;

// The online softmax (Milakov and Gimelshein, 2018) of a thread's rows. m is kept as shift = −scale · m, and
// P = 2^(scale · s + shift); `scale` turns scores into powers of two.
template <int kSlots>
struct OnlineSoftmax {
  static constexpr bool kBounded = false;
  static constexpr float kRescaleThreshold = 8;  // for update_lazily(): P ≤ 2^8
  static constexpr int kManyTiles = 10;  // with this many column tiles, maxima by bits are faster on sm_90
  static constexpr float kEmptyRow = FLT_MAX;  // the shift of a row that has seen no key
  float shift[kSlots];
  float l[kSlots];  // this lane's share of Σ P
  float scale;

  __device__ __forceinline__ explicit OnlineSoftmax(float scale_log2) : scale(scale_log2) {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) shift[slot] = kEmptyRow, l[slot] = 0;
  }

  // If P would exceed 2^kRescaleThreshold, which is rare after the first tiles: m ← max(m, rowmax S),
  // l ← α l, O ← α O.
  template <class S, class O>
  __device__ __forceinline__ void update_lazily(const S& s, O& o) {
    float maxima[kSlots];
    if (__any_sync(~0u, exceeds_threshold(s, maxima))) rescale(maxima, o);
  }

  // m ← max(m, rowmax S), l ← α l. The caller multiplies O by α.
  template <class S>
  __device__ __forceinline__ void update(const S& s, float (&alpha)[kSlots]) {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const float next =
          fminf(shift[slot], -row_max(thread_max(s, slot)) * scale);  // kEmptyRow if all keys are hidden
      alpha[slot] = ptx::exp2(next - shift[slot]);
      shift[slot] = next;
      l[slot] *= alpha[slot];
    }
  }

  // P = 2^(scale · S + shift), in place, of column tiles [begin, end).
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

  // update() and P of a whole tile, whose scores are S + row_term.
  template <class S>
  __device__ __forceinline__ void exponentiate(S& s, float (&alpha)[kSlots],
                                               const float (&row_term)[kSlots]) {
    float before[kSlots], within[kSlots];
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      before[slot] = shift[slot];
      within[slot] = shift[slot] += row_term[slot];
    }
    update(s, alpha);
    exponentiate(s, 0, S::kColumnTiles);
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot)
      shift[slot] = shift[slot] == within[slot] ? before[slot] : shift[slot] - row_term[slot];
  }

  // The largest score of a row, after update(); −∞ if the row has seen no key.
  __device__ __forceinline__ float maximum(int slot) const {
    return shift[slot] == kEmptyRow ? -INFINITY : -shift[slot] * kLn2;
  }

  // sink: as in result_of_row().
  __device__ __forceinline__ RowResult finish(int slot, float sink) const {
    return result_of_row(shift[slot] == kEmptyRow ? -INFINITY : -shift[slot], row_sum(l[slot]), sink);
  }

 protected:
  // The maxima of a thread's own elements of each row.
  template <class S>
  __device__ __forceinline__ static void thread_maxima(const S& s, float (&maxima)[kSlots]) {
    if constexpr (S::kColumnTiles >= kManyTiles) {
      thread_maxima_by_bits(s, maxima);
    } else {
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) maxima[slot] = thread_max(s, slot);
    }
  }

  // Compares the bits of floats as integers, because one instruction of sm_90 finds the maximum of three
  // integers. The order is the same, except among negative floats, where it is reversed: if all are negative,
  // a second pass finds the minimum. A NaN may hide the lane's other scores of a row, but then the row's P
  // are NaN in any case.
  template <class S>
  __device__ __forceinline__ static void thread_maxima_by_bits(const S& s, float (&maxima)[kSlots]) {
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
    for (int slot = 0; slot < kSlots; ++slot) maxima[slot] = __int_as_float(top[slot]);
  }

  // The thread's maxima, and whether one of them is above the threshold.
  template <class S>
  __device__ __forceinline__ bool exceeds_threshold(const S& s, float (&maxima)[kSlots]) const {
    bool above = false;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      maxima[slot] = thread_max(s, slot);
      above |= fmaf(maxima[slot], scale, shift[slot]) > kRescaleThreshold;
    }
    return above;
  }

 private:
  template <class O>
  __device__ __forceinline__ void rescale(const float (&maxima)[kSlots], O& o) {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const float top = row_max(maxima[slot]);
      // Each row is tested by itself, so that its result does not depend on the other rows of the warp.
      const float next = fmaf(top, scale, shift[slot]) > kRescaleThreshold ? -top * scale : shift[slot];
      const float alpha = ptx::exp2(next - shift[slot]);
      shift[slot] = next;
      l[slot] *= alpha;
      o.scale_row(slot, alpha);
    }
  }
};

// The softmax of scores within [−bound, bound], if P has float32's range: O is never rescaled, and m is
// computed only for the result row_max. The shift, which is the same for all rows, has already been added to
// the scores.
template <int kSlots>
struct BoundedSoftmax : OnlineSoftmax<kSlots> {
  using Base = OnlineSoftmax<kSlots>;
  using Base::l, Base::shift;
  static constexpr bool kBounded = true;
  uint32_t top[kSlots];  // bits of this lane's largest S + shift

  // P = e^(s − bound), or larger if that could be less than e^−80.
  __device__ __forceinline__ explicit BoundedSoftmax(float bound) : Base(1) {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      shift[slot] = -kLog2e * fminf(bound, 80 - bound);
      top[slot] = __float_as_uint(-INFINITY);
    }
  }

  template <class S>
  __device__ __forceinline__ void update(const S&, float (&)[kSlots]) {}

  // top ← max(top, S). It compares bits as integers, because one instruction of sm_90 finds the minimum of
  // three. As unsigned integers, negative floats are above all others and in reverse order, so the minimum is
  // the largest float if all are negative, as S + shift nearly always is. If not, a second pass finds the
  // maximum of signed integers. A NaN may be ignored.
  template <class S>
  __device__ __forceinline__ void raise_maxima(const S& s) {
    const auto bits = [&](int slot, int i) { return __float_as_uint(s.at(slot, i / 2, i % 2)); };
    uint32_t least[kSlots], all = ~0u;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      least[slot] = top[slot];
#pragma unroll
      for (int i = 0; i < 2 * S::kColumnTiles; i += 2)
        least[slot] = ptx::min3(least[slot], bits(slot, i), bits(slot, i + 1));
      all &= least[slot];
    }
    if (__any_sync(~0u, all >> 31 == 0)) {
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
        int most = static_cast<int>(top[slot]);
#pragma unroll
        for (int i = 0; i < 2 * S::kColumnTiles; i += 2)
          most = ptx::max3(most, static_cast<int>(bits(slot, i)), static_cast<int>(bits(slot, i + 1)));
        if (least[slot] >> 31 == 0) least[slot] = static_cast<uint32_t>(most);
      }
    }
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) top[slot] = least[slot];
  }

  // The largest score of a row among those that raise_maxima() has seen; −∞ if there is none.
  __device__ __forceinline__ float maximum(int slot) const {
    return (row_max(__uint_as_float(top[slot])) - shift[slot]) * kLn2;
  }

  // P = 2^S, in place, of column tiles [begin, end).
  template <class S>
  __device__ __forceinline__ void exponentiate(S& s, int begin, int end) {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot)
#pragma unroll
      for (int n = begin; n < end; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s.at(slot, n, e);
          x = ptx::exp2(x);
          l[slot] += x;
        }
  }

  // Must be called before finish(), which the base class has.
  __device__ __forceinline__ void mark_empty_rows() {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot)
      if (row_sum(l[slot]) == 0) shift[slot] = Base::kEmptyRow;
  }
};

// The online softmax of scores of any magnitude: if |shift| is large, S becomes S − m, and the shift 0. M
// is the type of m: volatile float if it is seldom read and there are few registers.
template <int kSlots, class M>
struct UnboundedSoftmax : OnlineSoftmax<kSlots> {
  using Base = OnlineSoftmax<kSlots>;
  using Base::l, Base::scale, Base::shift;
  M m[kSlots];
  bool subtracted = false;  // some row has a shift of 0 instead of −scale · m
  // Whether a NaN among a tile's elements makes the maxima NaN, unless its sign bit is set.
  template <class S>
  static constexpr bool kFindsNan = S::kColumnTiles >= Base::kManyTiles;

  __device__ __forceinline__ explicit UnboundedSoftmax(float scale_log2) : Base(scale_log2) {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) m[slot] = -Base::kEmptyRow;
  }

  template <class S, class O>
  __device__ __forceinline__ void update_lazily(S& s, O& o) {
    float maxima[kSlots];
    if (__any_sync(~0u, subtracted | Base::exceeds_threshold(s, maxima))) rescale(s, maxima, o);
  }

  template <class S>
  __device__ __forceinline__ void update(S& s, float (&alpha)[kSlots]) {
    float maxima[kSlots];
    Base::thread_maxima(s, maxima);
    update_by(s, maxima, alpha);
  }
  // Likewise if NaN may be hidden: hide() sets hidden elements of S to −∞.
  template <class S, class Hide>
  __device__ __forceinline__ void update(S& s, float (&alpha)[kSlots], Hide hide) {
    static_assert(kFindsNan<S>);
    float maxima[kSlots];
    Base::thread_maxima(s, maxima);
    bool found = false;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) found |= isnan(maxima[slot]);
    if (__builtin_expect(__any_sync(~0u, found), false)) {
      hide();
      Base::thread_maxima(s, maxima);
    }
    update_by(s, maxima, alpha);
  }

  __device__ __forceinline__ float maximum(int slot) const {
    return m[slot] == -Base::kEmptyRow ? -INFINITY : m[slot] * scale * kLn2;
  }

  __device__ __forceinline__ RowResult finish(int slot, float sink) const {
    return result_of_row(m[slot] == -Base::kEmptyRow ? -INFINITY : m[slot] * scale, row_sum(l[slot]), sink);
  }

 private:
  // `maxima`: the maxima of the thread's own elements of each row.
  template <class S>
  __device__ __forceinline__ void update_by(S& s, const float (&maxima)[kSlots], float (&alpha)[kSlots]) {
    float largest_shift = 0;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const float before = m[slot], next = fmaxf(before, row_max(maxima[slot]));
      alpha[slot] = ptx::exp2((before - next) * scale);
      m[slot] = next;
      shift[slot] = -next * scale;
      l[slot] *= alpha[slot];
      largest_shift = fmaxf(largest_shift, fabsf(shift[slot]));
    }
    if (__builtin_expect(largest_shift < kLargeShift, true)) return;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) subtract_maximum(s, slot);
  }

  template <class S, class O>
  __device__ __forceinline__ void rescale(S& s, const float (&maxima)[kSlots], O& o) {
    float tops[kSlots], alpha[kSlots];
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) tops[slot] = row_max(maxima[slot]);
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      alpha[slot] = subtracted ? update_maximum(slot, tops[slot]) : update_shift(slot, tops[slot]);
      l[slot] *= alpha[slot];
      o.scale_row(slot, alpha[slot]);
    }
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) subtracted |= subtract_maximum(s, slot);
  }

  // Updates a row whose maximum in this tile is `top`, and returns α: by the shift, or by m if some rows have
  // a shift of 0. The two round differently.
  __device__ __forceinline__ float update_shift(int slot, float top) {
    const bool rises = fmaf(top, scale, shift[slot]) > Base::kRescaleThreshold;
    const float next = rises ? -top * scale : shift[slot], alpha = ptx::exp2(next - shift[slot]);
    if (rises) m[slot] = top;
    shift[slot] = next;
    return alpha;
  }

  __device__ __forceinline__ float update_maximum(int slot, float top) {
    const float before = m[slot], next = (top - before) * scale > Base::kRescaleThreshold ? top : before;
    m[slot] = next;
    shift[slot] = -next * scale;
    return ptx::exp2((before - next) * scale);
  }

  // If a row's shift is large: S ← S − m, and the shift becomes 0. Returns whether that was done.
  template <class S>
  __device__ __forceinline__ bool subtract_maximum(S& s, int slot) {
    if (fabsf(shift[slot]) < kLargeShift) return false;
    shift[slot] = m[slot] == -Base::kEmptyRow ? Base::kEmptyRow : 0;
    if (m[slot] == -Base::kEmptyRow) return false;
#pragma unroll
    for (int n = 0; n < S::kColumnTiles; ++n) s.at(slot, n, 0) -= m[slot], s.at(slot, n, 1) -= m[slot];
    return true;
  }
};

}  // namespace jax_flash
