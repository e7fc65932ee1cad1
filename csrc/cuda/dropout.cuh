// What dropout keeps of an accumulator: bits made before they are used, or the numbers themselves.
#pragma once

#include <cstdint>

#include "core/dropout.h"
#include "cuda/ptx/math.cuh"
#include "cuda/tile/operands.cuh"

namespace jax_flash {

// Which elements of an accumulator dropout keeps.
template <class S>
struct KeptElements {
  static constexpr int kCount = S::kSlots * S::kColumnTiles * 2;
  static constexpr int kWords = (kCount + 31) / 32;
  uint32_t bits[kWords] = {};

  __device__ __forceinline__ static constexpr int index(int slot, int n, int e) {
    return (slot * S::kColumnTiles + n) * 2 + e;
  }
  // P ← 0 where dropped, column tiles [begin, end); the 1 / (1 − rate) of what is kept waits for the
  // epilogue.
  __device__ __forceinline__ void drop(S& s, int begin, int end) const {
#pragma unroll
    for (int slot = 0; slot < S::kSlots; ++slot)
#pragma unroll
      for (int n = begin; n < end; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) s.at(slot, n, e) = at(slot, n, e) ? s.at(slot, n, e) : 0;
  }
  // Of column tiles n to n + 3, in order.
  __device__ __forceinline__ void set_group(int slot, int n, uint32_t kept) {
    bits[index(slot, n, 0) / 32] |= kept << index(slot, n, 0) % 32;
  }
  __device__ __forceinline__ bool at(int slot, int n, int e) const {
    return bits[index(slot, n, e) / 32] >> index(slot, n, e) % 32 & 1;
  }
};

// The same in both halves.
__device__ __forceinline__ constexpr uint32_t pair_of(uint32_t x) { return x * 0x10001u; }

// Dropout's numbers for an accumulator that is not dealt, or for kTiles of its column tiles at a time: two
// neighbours in a word, and in the same word those of the row 8 further.
template <class S, int kTiles = 4>
struct KeptNumbers {
  uint32_t word[S::kSlots / 2][kTiles];
  uint32_t threshold;  // in both halves

  KeptNumbers() = default;
  __device__ __forceinline__ explicit KeptNumbers(uint32_t t) : threshold(pair_of(t)) {}

  // Of the rows of a slot and of the next, column tiles n to n + 3.
  __device__ __forceinline__ void set(int slot, int n, const PhiloxBlock& block) {
    static_assert(!S::kDealt);
#pragma unroll
    for (int i = 0; i < 4; ++i) word[slot / 2][(n + i) % kTiles] = block.word[i];
  }
  // The byte of a word that is the upper one of the number of a slot's row, even or odd column.
  __device__ __forceinline__ static int upper_byte(int slot, int e) {
    return slot % 2 ? (e ? 0 : 2) : (e ? 3 : 1);
  }
  // Whether the numbers of a pair reach the threshold, as a mask of 16 bits each.
  __device__ __forceinline__ uint32_t mask(int slot, int n) const {
    const uint32_t x = word[slot / 2][n % kTiles];
    const uint32_t numbers = (slot % 2 ? Dropout::turned(x) : x) & pair_of(kDropoutNumbers - 1);
    return ptx::not_below(numbers, threshold);  // nor are those beyond infinity
  }
};

// P where dropout keeps it, rounded on the way.
template <class T, class S>
struct DroppedA {
  static constexpr bool kInRegisters = true;
  const S& s;
  const KeptNumbers<S>& numbers;
  __device__ __forceinline__ void load(uint32_t (&a)[4], int m, int k) const {
    RegistersA<T, S>{s}.load(a, m, k);
    if constexpr (sizeof(T) == 2) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] &= numbers.mask(2 * m + i % 2, 2 * k + i / 2);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t mask = numbers.mask(2 * m + i % 2, k);
        a[i] &= i / 2 ? ptx::sign_of_high(mask) : ptx::sign_of_low(mask);
      }
    }
  }
};

}  // namespace jax_flash
