// What dropout keeps of an accumulator: bits made before they are used, or the numbers themselves.
#pragma once

#include <cstdint>

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

// A threshold for two numbers of 16 bits in a word.
struct PairThreshold {
  static constexpr uint32_t kTop = 0x80008000u;
  uint32_t threshold, low;  // what the lower 15 bits have to reach, in both halves; ~0: the top bit is enough

  PairThreshold() = default;
  __device__ __forceinline__ explicit PairThreshold(uint32_t t)
      : threshold((t > 0x8000u ? t - 0x8000u : t) * 0x10001u), low(t > 0x8000u ? 0 : ~0u) {}

  // In the top bits of both halves.
  __device__ __forceinline__ uint32_t reached(uint32_t x) const {
    const uint32_t y = (x | kTop) - threshold;
    return (x & y) | (low & (x | y));
  }
};

// Dropout's numbers for four column tiles, of a dealt S: two neighbours in a word.
template <class S>
struct KeptNumbers {
  uint32_t word[S::kSlots][4];
  PairThreshold threshold;

  // Whether the numbers of a pair reach the threshold, as a mask of 16 bits each.
  __device__ __forceinline__ uint32_t halves(int slot, int n) const {
    return ptx::signs_of_halves(threshold.reached(word[slot][n % 4]));
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
      for (int i = 0; i < 4; ++i) a[i] &= numbers.halves(2 * m + i % 2, 2 * k + i / 2);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t halves = numbers.halves(2 * m + i % 2, k);
        a[i] &= i / 2 ? ptx::sign_of_high(halves) : ptx::sign_of_low(halves);
      }
    }
  }
};

}  // namespace jax_flash
