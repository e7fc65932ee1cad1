// What dropout keeps of an accumulator that is not dealt, as the sm90 forward asks for it: whole tiles, few
// registers.
#pragma once

#include <cstdint>

#include "cuda/dropout.cuh"
#include "cuda/score.cuh"

namespace jax_flash {

// Which pairs of an accumulator that is not dealt dropout keeps, in as many registers as bits need: bit 7 − g
// of a byte is that of row and four column tiles g; the bytes are, from the highest, those of column tiles t
// and t + 2 of four, odd columns, then even ones, and a word has t = 0, another t = 1.
template <class S>
struct KeptPairs {
  static constexpr int kQuads = (S::kColumnTiles + 3) / 4, kGroups = S::kSlots * kQuads;
  uint32_t word[2];

  // That of a row slot and column tile.
  static __device__ __forceinline__ int group(int slot, int n) {
    static_assert(kGroups <= 8 && !S::kDealt);
    return n / 4 * S::kSlots + slot;
  }
  static __device__ __forceinline__ int bit(int slot, int n, int e) {
    return 16 * e + (n % 4 < 2 ? 8 : 0) + 7 - group(slot, n);
  }

  // of_word[i]: word i of the blocks that the lane made, of columns 2i and 2i + 1 of column tile `lane % 4`
  // of four, bit 7 − g of the upper byte of each half. Lane i of a row wants word i of all four.
  __device__ __forceinline__ static KeptPairs exchange(const uint32_t (&of_word)[4]) {
    const uint32_t low = of_word[0] | of_word[1] >> 8, high = of_word[2] | of_word[3] >> 8;
    const bool upper = threadIdx.x & 2, odd = threadIdx.x & 1;
    const uint32_t mine = upper ? high : low;
    const uint32_t other = __shfl_xor_sync(~0u, upper ? low : high, 2);
    const uint32_t first = upper ? other : mine,
                   second = upper ? mine : other;  // of column tiles t and t + 2
    const uint32_t even_word = ptx::choose_bytes<0x3715>(first, second),
                   odd_word = ptx::choose_bytes<0x2604>(first, second);
    const uint32_t own = odd ? odd_word : even_word;
    const uint32_t others = __shfl_xor_sync(~0u, odd ? even_word : odd_word, 1);
    return {{odd ? others : own, odd ? own : others}};
  }

  // Of a pair of 16-bit elements.
  __device__ __forceinline__ uint32_t mask(int slot, int n) const {
    const uint32_t x = word[n % 2] << group(slot, n);
    return n % 4 < 2 ? ptx::signs_of_halves(x) : ptx::signs_of_lower_bytes(x);
  }
};

// A lane makes the blocks of one of four column tiles for every row and 32 columns; their bits are exchanged
// at once.
template <class S>
__device__ __forceinline__ KeptPairs<S> kept_pairs(const ScoreOperands& operands, int32_t row, int32_t key) {
  using Kept = KeptPairs<S>;
  const Dropout& dropout = operands.dropout;
  const uint32_t first = (key + dropout.column) / kDropoutBlock + threadIdx.x % 4;
  PairThreshold threshold(dropout.threshold);
  // Were it known how they are made, they would be made again for every word.
  asm("" : "+r"(threshold.threshold), "+r"(threshold.low));
  uint32_t of_word[4] = {};
#pragma unroll
  for (int quad = 0; quad < Kept::kQuads; ++quad) {
    PhiloxBlock blocks[S::kSlots];
#pragma unroll
    for (int slot = 0; slot < S::kSlots; ++slot)
      blocks[slot] = dropout.counter(operands.batch, operands.head, row + S::row(slot), first + 4 * quad);
    philox(dropout.key0, dropout.key1, blocks);
#pragma unroll
    for (int slot = 0; slot < S::kSlots; ++slot) {
      const int group = Kept::group(slot, 4 * quad);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        of_word[i] |= threshold.reached(blocks[slot].word[i]) >> group & PairThreshold::kTop >> group;
    }
  }
  return Kept::exchange(of_word);
}

// Where a shard begins within a block.
template <class S>
__device__ __forceinline__ KeptPairs<S> kept_pairs_one_by_one(const ScoreOperands& operands, int32_t row,
                                                              int32_t key) {
  const Dropout& dropout = operands.dropout;
  KeptPairs<S> result{};
#pragma unroll 1
  for (int at = 0; at < S::kSlots * S::kColumnTiles * 2; ++at) {
    const int e = at % 2, n = at / 2 % S::kColumnTiles, slot = at / 2 / S::kColumnTiles;
    const bool kept = dropout.keep(operands.batch, operands.head, row + S::row(slot), key + S::column(n) + e);
    const uint32_t bit = uint32_t{kept} << KeptPairs<S>::bit(slot, n, e);
    result.word[0] |= n % 2 ? 0 : bit;
    result.word[1] |= n % 2 ? bit : 0;
  }
  return result;
}

}  // namespace jax_flash
