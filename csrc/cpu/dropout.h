// Dropout of one row of P, a vector of Philox blocks at a time.
#pragma once

#include "isa.h"
// isa.h goes first: it makes the core force-inlined.
#include "../core/dropout.h"
#include "head.h"

namespace jax_flash::JF_ISA {

typedef uint64_t Wide __attribute__((vector_size(kLanes * 4), may_alias));
inline constexpr int kWideLanes = kLanes / 2;

// The 64-bit products of the low halves of each lane.
JF_INLINE Wide multiply_halves(Wide a, Wide b) {
#if defined(__AVX512F__)
  return (Wide)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Wide)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (Wide)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu);
#endif
}

template <int... lane>
JF_INLINE Wide count_up(std::integer_sequence<int, lane...>) {
  return Wide{lane...};
}

// Reorders Philox words into column order. A lane of `first` holds words 0 and 1 of a block, a lane of
// `second` words 2 and 3. The result is word 0 of four blocks (columns 0 to 7), then word 1 of these blocks,
// and so on; `part` selects one of the two vectors that it fills.
template <int part, int... lane>
JF_INLINE UInt order_words(Wide first, Wide second, std::integer_sequence<int, lane...>) {
  constexpr auto from = [](int at) { return at / 8 % 2 * kLanes + (at / 16 * 4 + at % 4) * 2 + at / 4 % 2; };
  return __builtin_shufflevector((UInt)first, (UInt)second, from(part * kLanes + lane)...);
}

// Dropout::rotated of both words of a lane.
JF_INLINE Wide rotated(Wide x) { return (x >> 8 & 0x00FFFFFF00FFFFFFu) | (x << 24 & 0xFF000000FF000000u); }

// kWideLanes consecutive Philox blocks from `index` on: words 0 and 1 of a block in a lane of `first`,
// words 2 and 3 in a lane of `second`.
struct WideBlocks {
  Wide first, second;
};
JF_INLINE WideBlocks philox_blocks(const Dropout& dropout, uint32_t b, uint32_t h, uint32_t i,
                                   uint32_t index) {
  using Lanes = std::make_integer_sequence<int, kWideLanes>;
  const PhiloxBlock counter = dropout.counter(b, h, i, index);
  Wide c0 = count_up(Lanes()) + counter.word[0], c1 = Wide{} + counter.word[1];  // in the low halves
  Wide c2 = Wide{} + counter.word[2], c3 = Wide{} + counter.word[3];
  uint32_t key0 = dropout.key0, key1 = dropout.key1;
#pragma GCC unroll 7
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const Wide x = multiply_halves(Wide{} + kPhiloxMultiplier0, c0);
    const Wide y = multiply_halves(Wide{} + kPhiloxMultiplier1, c2);
    c0 = y >> 32 ^ c1 ^ key0;
    c1 = y;
    c2 = x >> 32 ^ c3 ^ key1;
    c3 = x;
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
  const Wide first = (c0 & 0xFFFFFFFFu) | c1 << 32, second = (c2 & 0xFFFFFFFFu) | c3 << 32;
  if (!dropout.second(i)) return {first, second};
  return {rotated(first), rotated(second)};
}

// Stores the dropout numbers of kDropoutStep columns: those of kWideLanes blocks, or of 32 columns if that is
// more.
inline constexpr int kDropoutStep = std::max(kWideLanes * kDropoutColumns / 4, kDropoutColumns);
JF_INLINE void dropout_numbers(const Dropout& dropout, uint32_t b, uint32_t h, uint32_t i, uint32_t index,
                               uint16_t* numbers) {
  const auto [first, second] = philox_blocks(dropout, b, h, i, index);
  if constexpr (kWideLanes >= 4) {
    using Lanes = std::make_integer_sequence<int, kLanes>;
    UInt* to = reinterpret_cast<UInt*>(numbers);
    to[0] = order_words<0>(first, second, Lanes());
    to[1] = order_words<1>(first, second, Lanes());
  } else {
    const auto [third, fourth] = philox_blocks(dropout, b, h, i, index + kWideLanes);
    const Wide words[2][2] = {{first, second}, {third, fourth}};
    for (int c = 0; c < kDropoutColumns; ++c) {
      const int block = c / 2 % 4, half = c / 8 % 2 * 2 + c % 2;
      numbers[c] = static_cast<uint16_t>(words[block / 2][c / 16][block % 2] >> 16 * half);
    }
  }
}

inline void Head::dropout_row(Row row, int32_t j0, Columns visible, float* keep) const {
  const Columns whole = vectors(visible);
  const uint32_t first = static_cast<uint32_t>(j0 + whole.lo) + dropout.column;
  const int32_t skip = first % kDropoutColumns, n = skip + whole.hi - whole.lo;
  alignas(64) uint16_t numbers[kTileN + 2 * kLanes + 2 * kDropoutStep];
  for (int32_t c = 0; c < n; c += kDropoutStep) {
    dropout_numbers(dropout, sequence.index, row.head, row.position, Dropout::index(first - skip + c),
                    numbers + c);
  }
  for (int32_t c = whole.lo; c < whole.hi; c += kLanes) {
    const UInt number = load_halves(numbers, skip + c - whole.lo);
    store(keep + c,
          (number & (kDropoutNumbers - 1)) >= dropout.threshold ? broadcast(dropout.scale) : Float{});
  }
}

}  // namespace jax_flash::JF_ISA
