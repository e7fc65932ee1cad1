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

// kWord adjacent features. Those of 16 bits lie two in a register: the compiler would give each its own.
template <class T, int kWord>
struct alignas(std::min<size_t>(16, sizeof(T) * kWord)) Words {
  T x[kWord];

  __device__ __forceinline__ void unpack(float (&to)[kWord]) const {
#pragma unroll
    for (int i = 0; i < kWord; ++i) to[i] = static_cast<float>(x[i]);
  }
  __device__ __forceinline__ void pack(const float (&from)[kWord]) {
#pragma unroll
    for (int i = 0; i < kWord; ++i) x[i] = T(from[i]);
  }
};

template <class T>
struct alignas(16) PairWords {
  uint32_t x[4];

  __device__ __forceinline__ void unpack(float (&to)[8]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 two = ptx::unpack<T>(x[i]);
      to[2 * i] = two.x, to[2 * i + 1] = two.y;
    }
  }
  __device__ __forceinline__ void pack(const float (&from)[8]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = ptx::pack<T>(from[2 * i], from[2 * i + 1]);
  }
};
template <>
struct Words<__half, 8> : PairWords<__half> {};
template <>
struct Words<__nv_bfloat16, 8> : PairWords<__nv_bfloat16> {};

// The units of a token: of its key at all heads, pairs of words that are rotated and words that are not, then
// words of its value.
struct Units {
  Divisor pairs, rest, value;  // of one head, at least 1 as a divisor
  Divisor of_token;            // likewise of `all`
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

// What a unit is of one token.
template <class T, int kWord>
struct UnitWords {
  Words<T, kWord> a, b;
  Words<float, kWord> cos, sin;
};

// A unit of all tokens of a leading entry. Of a rotated pair of words the features (a[i], b[i]) turn by angle
// i; where pairs are interleaved, a and b are adjacent words and their features (2 i, 2 i + 1) do.
template <class T, class Pool, int kWord>
struct Unit {
  using Data = UnitWords<T, kWord>;
  bool of_value;
  int32_t head, second;          // second: from the first word of a pair to the other; 0: a single word
  const T* rows;                 // of token 0
  Pool* pool;                    // slot 0 of page 0
  const float *cosines, *sines;  // of position 0

  Unit() = default;
  // first_head: is added to the head that the unit's number says.
  __device__ __forceinline__ Unit(const AppendCall& call, const Units& units, int32_t entry, int32_t unit,
                                  int32_t first_head = 0) {
    of_value = unit >= units.key_pairs + units.key_words;
    second = 0;
    int32_t first, angle = 0;
    if (unit < units.key_pairs) {
      head = units.pairs.quotient(unit);
      angle = (unit - head * units.pairs.value) * kWord;
      first = call.interleaved ? 2 * angle : angle;
      second = call.interleaved ? kWord : call.rotated;
    } else if (of_value) {
      unit -= units.key_pairs + units.key_words;
      head = units.value.quotient(unit);
      first = (unit - head * units.value.value) * kWord;
    } else {
      unit -= units.key_pairs;
      head = units.rest.quotient(unit);
      first = (unit - head * units.rest.value) * kWord + 2 * call.rotated;
    }
    head += first_head;
    rows = stream(call).rows.template at<const T>(entry, 0, head, 0) + first;
    pool = stream(call).pool.template at<Pool>(entry, 0, head, 0) + first;
    cosines = call.cos.at<const float>(entry, 0, 0, 0) + angle;
    sines = call.sin.at<const float>(entry, 0, 0, 0) + angle;
  }

  __device__ __forceinline__ void load(const AppendCall& call, int32_t row, Data& data) const {
    const T* const from = rows + row * stream(call).rows.row;
    data.a = *reinterpret_cast<const Words<T, kWord>*>(from);
    if (second > 0) data.b = *reinterpret_cast<const Words<T, kWord>*>(from + second);
  }
  __device__ __forceinline__ void load_angles(const AppendCall& call, int32_t position, Data& data) const {
    if (second == 0) return;
    const int32_t row = rotary_row(position, call.positions);
    data.cos = *reinterpret_cast<const Words<float, kWord>*>(cosines + row * call.cos.row);
    data.sin = *reinterpret_cast<const Words<float, kWord>*>(sines + row * call.sin.row);
  }

  // Rotates, and rounds to T as if the key had come that way from the caller.
  __device__ __forceinline__ void rotate(const AppendCall& call, Data& data) const {
    if (second == 0) return;
    float x[2 * kWord];
    unpack(data, x);
#pragma unroll
    for (int i = 0; i < kWord; ++i) {
      if (call.interleaved) {
        jax_flash::rotate(x[2 * i], x[2 * i + 1], data.cos.x[i], data.sin.x[i]);
      } else {
        jax_flash::rotate(x[i], x[i + kWord], data.cos.x[i], data.sin.x[i]);
      }
    }
    data.a.pack(reinterpret_cast<const float (&)[kWord]>(x[0]));
    data.b.pack(reinterpret_cast<const float (&)[kWord]>(x[kWord]));
  }

  // The largest finite magnitude, as bits.
  __device__ __forceinline__ uint32_t largest(const Data& data) const {
    float x[2 * kWord];
    unpack(data, x);
    uint32_t most = 0;
#pragma unroll
    for (int i = 0; i < 2 * kWord; ++i) {
      const uint32_t bits = float_bits(x[i]) & 0x7FFFFFFFu;
      if (bits < 0x7F800000u && (i < kWord || second > 0)) most = max(most, bits);
    }
    return most;
  }

  // float8 stores x / scale.
  __device__ __forceinline__ void store(const AppendCall& call, const Slot& slot, const Data& data,
                                        float scale) const {
    const AppendView& strides = stream(call).pool;
    Pool* const to = pool + (slot.page * strides.batch + slot.slot * strides.row);
    store_word(to, data.a, call.stored, scale);
    if (second > 0) store_word(to + second, data.b, call.stored, scale);
  }
  // The scale that the caller gave to the page.
  __device__ __forceinline__ float scale_of(const AppendCall& call, int32_t entry, int32_t page) const {
    const AppendView& scale = stream(call).scale;
    return scale ? *scale.at<const float>(entry, page, head, 0) : 1;
  }

 private:
  __device__ __forceinline__ const AppendStream& stream(const AppendCall& call) const {
    return of_value ? call.value : call.key;
  }
  // Both words.
  __device__ __forceinline__ static void unpack(const Data& data, float (&x)[2 * kWord]) {
    data.a.unpack(reinterpret_cast<float (&)[kWord]>(x[0]));
    data.b.unpack(reinterpret_cast<float (&)[kWord]>(x[kWord]));
  }

  __device__ __forceinline__ static void store_word(Pool* to, const Words<T, kWord>& from, DType stored,
                                                    float scale) {
    if constexpr (sizeof(Pool) == 1) {
      Words<Pool, kWord> word;
      float x[kWord];
      from.unpack(x);
      ptx::with_format(stored, [&]<DType kFormat>() {
#pragma unroll
        for (int i = 0; i < kWord; i += 2) {
          const float low = x[i] / scale, high = i + 1 < kWord ? x[min(i + 1, kWord - 1)] / scale : 0;
          const uint16_t two = ptx::narrow_float8<kFormat>(low, high);
          word.x[i] = static_cast<Pool>(two);
          if (i + 1 < kWord) word.x[min(i + 1, kWord - 1)] = static_cast<Pool>(two >> 8);
        }
      });
      *reinterpret_cast<Words<Pool, kWord>*>(to) = word;
    } else {
      *reinterpret_cast<Words<T, kWord>*>(to) = from;
    }
  }
};

// Calls run.operator()<kWord>(units) with words of 16 bytes where rows consist of them, else of one feature.
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
