// The work of append_kv on one token: words of adjacent features, which are copied, rotated or quantised.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/float8.h"
#include "core/rotary.h"
#include "cuda/append/call.cuh"
#include "cuda/append/tokens.cuh"
#include "cuda/ptx/float8.cuh"
#include "cuda/ptx/math.cuh"

namespace jax_flash::append {

template <class T, int kWord>
struct alignas(std::min<size_t>(16, sizeof(T) * kWord)) Words {
  T x[kWord];
};

// The units of a token: pairs of words of its key that are rotated, words of its key that are not, and words
// of its value, each at all heads.
struct Units {
  Divisor pairs, rest, value;  // units of one head; 1 instead of 0, because they are divisors
  Divisor of_token;            // units of all heads; likewise
  int32_t key_pairs, key_words, all;

  Units(int32_t heads, int32_t of_pairs, int32_t of_rest, int32_t of_value)
      : pairs(std::max(of_pairs, 1)),
        rest(std::max(of_rest, 1)),
        value(std::max(of_value, 1)),
        of_token(std::max(heads * (of_pairs + of_rest + of_value), 1)),
        key_pairs(heads * of_pairs),
        key_words(heads * of_rest),
        all(heads * (of_pairs + of_rest + of_value)) {}
};

// A unit of a new token. In a rotated pair of words, angle i rotates the features (a[i], b[i]). If pairs are
// interleaved, a and b are adjacent words, and it rotates their features (2 i, 2 i + 1) instead.
template <class T, class Pool, int kWord>
struct Unit {
  bool of_value;
  int32_t head, first, second, angle;  // features; second: −1 for a single word
  Words<T, kWord> a, b;
  Words<float, kWord> cos, sin;

  Unit() = default;
  __device__ __forceinline__ Unit(const AppendCall& call, const Units& units, int32_t unit) {
    of_value = unit >= units.key_pairs + units.key_words;
    second = -1;
    if (unit < units.key_pairs) {
      head = units.pairs.quotient(unit);
      angle = (unit - head * units.pairs.value) * kWord;
      first = call.interleaved ? 2 * angle : angle;
      second = call.interleaved ? first + kWord : first + call.rotated;
    } else if (of_value) {
      unit -= units.key_pairs + units.key_words;
      head = units.value.quotient(unit);
      first = (unit - head * units.value.value) * kWord;
    } else {
      unit -= units.key_pairs;
      head = units.rest.quotient(unit);
      first = (unit - head * units.rest.value) * kWord + 2 * call.rotated;
    }
  }

  __device__ __forceinline__ void load(const AppendCall& call, int32_t entry, int32_t row) {
    const T* const from = of_value ? call.value.rows.at<const T>(entry, 0, head, row)
                                   : call.key.rows.at<const T>(entry, 0, head, row);
    a = *reinterpret_cast<const Words<T, kWord>*>(from + first);
    if (second >= 0) b = *reinterpret_cast<const Words<T, kWord>*>(from + second);
  }
  __device__ __forceinline__ void load_angles(const AppendCall& call, int32_t entry, int32_t position) {
    if (second < 0) return;
    const int32_t row = rotary_row(position, call.positions);
    cos = *reinterpret_cast<const Words<float, kWord>*>(call.cos.at<const float>(entry, 0, 0, row) + angle);
    sin = *reinterpret_cast<const Words<float, kWord>*>(call.sin.at<const float>(entry, 0, 0, row) + angle);
  }

  // Rotates, and rounds to T, as if the caller had passed the rotated key.
  __device__ __forceinline__ void rotate(const AppendCall& call) {
    if (second < 0) return;
    if constexpr (sizeof(T) == 2 && kWord > 1) {
#pragma unroll
      for (int i = 0; i < kWord; i += 2) {
        if (call.interleaved) {
          turn_neighbours(&feature(2 * i), i), turn_neighbours(&feature(2 * i + 2), i + 1);
        } else {
          float2 x = ptx::load_pair(a.x + i), y = ptx::load_pair(b.x + i);
          jax_flash::rotate(x.x, y.x, cos.x[i], sin.x[i]),
              jax_flash::rotate(x.y, y.y, cos.x[i + 1], sin.x[i + 1]);
          ptx::store_pair(a.x + i, x.x, x.y), ptx::store_pair(b.x + i, y.x, y.y);
        }
      }
    } else if (call.interleaved) {
#pragma unroll
      for (int i = 0; i < kWord; ++i) turn(feature(2 * i), feature(2 * i + 1), i);
    } else {
#pragma unroll
      for (int i = 0; i < kWord; ++i) turn(a.x[i], b.x[i], i);
    }
  }

  // The largest finite magnitude, as bits.
  __device__ __forceinline__ uint32_t largest() const {
    uint32_t most = 0;
#pragma unroll
    for (int i = 0; i < kWord; ++i) {
      const uint32_t x = float_bits(static_cast<float>(a.x[i])) & 0x7FFFFFFFu;
      const uint32_t y = second < 0 ? 0u : float_bits(static_cast<float>(b.x[i])) & 0x7FFFFFFFu;
      most = max(most, max(x < 0x7F800000u ? x : 0u, y < 0x7F800000u ? y : 0u));
    }
    return most;
  }

  // float8 stores x / scale.
  __device__ __forceinline__ void store(const AppendCall& call, int32_t entry, Slot to, float scale) const {
    Pool* const row = of_value ? call.value.pool.at<Pool>(entry, to.page, head, to.slot)
                               : call.key.pool.at<Pool>(entry, to.page, head, to.slot);
    store_word(row + first, a, call.stored, scale);
    if (second >= 0) store_word(row + second, b, call.stored, scale);
  }
  // The scale that the caller gave to the page.
  __device__ __forceinline__ float scale_of(const AppendCall& call, int32_t entry, int32_t page) const {
    const AppendView& scale = of_value ? call.value.scale : call.key.scale;
    return scale ? *scale.at<const float>(entry, page, head, 0) : 1;
  }

 private:
  __device__ __forceinline__ void turn(T& x, T& y, int i) const {
    float new_x = static_cast<float>(x), new_y = static_cast<float>(y);
    jax_flash::rotate(new_x, new_y, cos.x[i], sin.x[i]);
    x = T(new_x), y = T(new_y);
  }
  __device__ __forceinline__ void turn_neighbours(T* at, int i) const {
    float2 x = ptx::load_pair(at);
    jax_flash::rotate(x.x, x.y, cos.x[i], sin.x[i]);
    ptx::store_pair(at, x.x, x.y);
  }
  __device__ __forceinline__ T& feature(int i) { return i < kWord ? a.x[i] : b.x[i - kWord]; }

  __device__ __forceinline__ static void store_word(Pool* to, const Words<T, kWord>& from, DType stored,
                                                    float scale) {
    Words<Pool, kWord> word;
    if constexpr (sizeof(Pool) == 1) {
      ptx::with_format(stored, [&]<DType kFormat>() {
#pragma unroll
        for (int i = 0; i < kWord; i += 2) {
          const float low = static_cast<float>(from.x[i]) / scale;
          const float high = i + 1 < kWord ? static_cast<float>(from.x[min(i + 1, kWord - 1)]) / scale : 0;
          const uint16_t two = ptx::narrow_float8<kFormat>(low, high);
          word.x[i] = static_cast<Pool>(two);
          if (i + 1 < kWord) word.x[min(i + 1, kWord - 1)] = static_cast<Pool>(two >> 8);
        }
      });
    } else {
#pragma unroll
      for (int i = 0; i < kWord; ++i) word.x[i] = from.x[i];
    }
    *reinterpret_cast<Words<Pool, kWord>*>(to) = word;
  }
};

// Calls run.operator()<kWord>(units), with words of 16 bytes if rows consist of such words, or of one
// feature.
template <class T, class Run>
auto with_words(const AppendProblem& p, int32_t heads, Run run) {
  constexpr int kWide = 16 / static_cast<int>(sizeof(T));
  const auto units = [&](int32_t word) {
    const int32_t rest = p.head_dim - 2 * p.rotated;
    return Units(heads, p.rotated / word, rest / word, p.value_dim / word);
  };
  const bool wide = p.head_dim % kWide == 0 && p.value_dim % kWide == 0 && p.rotated % kWide == 0;
  return wide ? run.template operator()<kWide>(units(kWide)) : run.template operator()<1>(units(1));
}

}  // namespace jax_flash::append
