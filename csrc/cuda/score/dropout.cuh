// The elements of an accumulator that dropout keeps: as bits, or as the Philox numbers that are compared with
// the threshold when P is rounded.
#pragma once

#include <cstdint>

#include "core/dropout.h"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/score/variant.cuh"
#include "cuda/tile/operands.cuh"

namespace jax_flash {

// x in both halves of a word.
__device__ __forceinline__ constexpr uint32_t pair_of(uint32_t x) { return x * 0x10001u; }

// The elements of an accumulator that dropout keeps, one bit each.
template <class S>
struct KeptElements {
  static constexpr int kCount = S::kSlots * S::kColumnTiles * 2;
  static constexpr int kWords = (kCount + 31) / 32;
  uint32_t bits[kWords] = {};

  // Two adjacent rows of a transposed S are 16 bits apart.
  __device__ __forceinline__ static constexpr int index(int slot, int n, int e) {
    if constexpr (!S::kTransposed) return (slot * S::kColumnTiles + n) * 2 + e;
    const int rows = (slot / 2 * S::kColumnTiles + n) * 2 + e;
    return rows / 16 * 32 + rows % 16 + slot % 2 * 16;
  }
  // P ← 0 where dropped, in column tiles [begin, end). The factor 1 / (1 − rate) is left to the epilogue.
  __device__ __forceinline__ void drop(S& s, int begin, int end) const {
#pragma unroll
    for (int slot = 0; slot < S::kSlots; ++slot)
#pragma unroll
      for (int n = begin; n < end; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) s.at(slot, n, e) = at(slot, n, e) ? s.at(slot, n, e) : 0;
  }
  // The 8 bits of column tiles n to n + 3.
  __device__ __forceinline__ void set_group(int slot, int n, uint32_t kept) {
    bits[index(slot, n, 0) / 32] |= kept << index(slot, n, 0) % 32;
  }
  // Sets the bits of two adjacent rows of a transposed S, from masks of 16 bits each.
  __device__ __forceinline__ void set_rows(int slot, int n, int e, uint32_t masks) {
    bits[index(slot, n, e) / 32] |= masks & pair_of(1u << index(slot, n, e) % 32);
  }
  __device__ __forceinline__ void set(int slot, int n, int e, bool kept) {
    bits[index(slot, n, e) / 32] |= uint32_t{kept} << index(slot, n, e) % 32;
  }
  __device__ __forceinline__ bool at(int slot, int n, int e) const {
    return bits[index(slot, n, e) / 32] >> index(slot, n, e) % 32 & 1;
  }
  // Where the element is kept: sum ← x · y + sum. Elsewhere: x ← 0, and y, which may be infinite, is not
  // read.
  __device__ __forceinline__ void multiply_add(int slot, int n, int e, float& x, float y, float& sum) const {
    const int i = index(slot, n, e);
    ptx::multiply_add_if_bit(bits[i / 32], 1u << i % 32, x, y, sum);
  }
};

// Dropout's numbers for an accumulator that is not permuted, or for kTiles of its column tiles at a time. A
// word holds the numbers of two adjacent columns in a row and, rotated by a byte, those of the same columns 8
// rows further on.
template <class S, int kTiles = 4>
struct KeptNumbers {
  uint32_t word[S::kSlots / 2][kTiles];
  uint32_t threshold;  // repeated in both halves

  KeptNumbers() = default;
  __device__ __forceinline__ explicit KeptNumbers(uint32_t t) : threshold(pair_of(t)) {}

  // Sets the numbers of a slot's row and of the next slot's, in column tiles n to n + 3.
  __device__ __forceinline__ void set(int slot, int n, const PhiloxBlock& block) {
    static_assert(!S::kPermuted);
#pragma unroll
    for (int i = 0; i < 4; ++i) word[slot / 2][(n + i) % kTiles] = block.word[i];
  }
  // Which byte of a word is the upper byte of the number of a slot's row, in the even or odd column.
  __device__ __forceinline__ static int upper_byte(int slot, int e) {
    return slot % 2 ? (e ? 0 : 2) : (e ? 3 : 1);
  }
  // Whether the numbers of a pair reach the threshold, as a mask of 16 bits each.
  __device__ __forceinline__ uint32_t mask(int slot, int n) const {
    const uint32_t x = word[slot / 2][n % kTiles];
    // The highest bit, which is no part of a number, is the sign. NaN, beyond infinity, is not below either.
    return ptx::size_not_below(slot % 2 ? Dropout::rotated(x) : x, threshold);
  }
};

// The numbers of a whole accumulator.
template <class S>
using KeptTile = KeptNumbers<S, S::kColumnTiles>;

// Exchanges a word of a block between two lanes of a transposed S that hold adjacent rows, 4 lanes apart.
// Calls set(0, mask) with the kept elements of both rows, the even one's in the lower half, and set(1, mask)
// with those of the rows 8 further. `own`: the word of this lane's row, which is odd or even.
template <class Set>
__device__ __forceinline__ void exchange_rows(uint32_t own, uint32_t odd, uint32_t threshold, Set set) {
  const uint32_t other = __shfl_xor_sync(~0u, own, 4);
  const auto masks = [&](uint32_t halves) {
    return ptx::size_not_below(__byte_perm(own, other, halves), threshold);
  };
  set(0, masks(odd ? 0x3276 : 0x5410));
  set(1, masks(odd ? 0x0347 : 0x6521));  // from the words rotated by a byte
}

// Dropout in a warp's accumulator of one batch entry and head, whose first row is `row` and whose first
// column is `key`. Only for calls with dropout.
struct TileDropout {
  const Dropout& dropout;
  const uint32_t &batch, &head;
  int32_t row, key;

  template <class S>
  __device__ __forceinline__ KeptElements<S> elements() const {
    if constexpr (S::kTransposed && S::kSlots % 4 == 0) {
      if (!dropout.needs_scalar_path()) return elements_of_transposed_blocks<S>();
    } else if constexpr (S::kPairs && S::kColumnTiles % 4 == 0) {
      if (!dropout.needs_scalar_path()) return elements_of_blocks<S>();
    }
    return elements_one_by_one<S>();
  }

  // The numbers of column tiles n to n + 3, unless needs_scalar_path().
  template <class S>
  __device__ __forceinline__ void draw(KeptNumbers<S>& numbers, int n) const {
#pragma unroll
    for (int slot = 0; slot < S::kSlots; slot += 2) numbers.set(slot, n, block<S>(slot, first_index() + n));
    numbers.threshold = pair_of(dropout.threshold);
  }

  // The numbers of all column tiles, unless needs_scalar_path().
  template <class S>
  __device__ __forceinline__ KeptTile<S> numbers() const {
    static_assert(S::kSlots == 2 && S::kColumnTiles % 4 == 0);
    const uint32_t first = first_index();
    constexpr int kTogether = 2;  // Philox blocks side by side: each is a chain of dependent instructions
    KeptTile<S> kept(dropout.threshold);
#pragma unroll
    for (int n = 0; n < S::kColumnTiles; n += 4 * kTogether) {
      PhiloxBlock blocks[kTogether];
#pragma unroll
      for (int b = 0; b < kTogether; ++b)
        blocks[b] = dropout.counter(batch, head, row + S::row(0), first + n + 4 * b);
      philox(dropout.key0, dropout.key1, blocks);
#pragma unroll
      for (int b = 0; b < kTogether; ++b)
        if (n + 4 * b < S::kColumnTiles) kept.set(0, n + 4 * b, blocks[b]);
    }
    return kept;
  }

  // The same for needs_scalar_path(), one element after the other. The numbers that it stores are not random:
  // they are above the threshold 0x4000 where dropout keeps the element, and below it elsewhere.
  template <class S>
  __device__ __forceinline__ KeptTile<S> numbers_one_by_one() const {
    KeptTile<S> kept(0x4000u);
    for (uint32_t& word : kept.word[0]) word = 0;
#pragma unroll 1
    for (int at = 0; at < 4 * S::kColumnTiles; ++at) {
      const int e = at % 2, slot = at / 2 % 2, n = at / 4;
      const bool keep = dropout.keep(batch, head, row + S::row(slot), key + S::column(n) + e);
      const uint32_t byte = 0x70u << (8 * KeptTile<S>::upper_byte(slot, e));
#pragma unroll
      for (int i = 0; i < S::kColumnTiles; ++i)
        if (i == n && keep) kept.word[0][i] |= byte;
    }
    return kept;
  }

 private:
  // The index of this lane's Philox block of the first 32 columns.
  __device__ __forceinline__ uint32_t first_index() const {
    return (key + dropout.column) / kDropoutColumns * 4 + threadIdx.x % 4;
  }
  // The Philox block for the rows of a slot and of the next slot.
  template <class S>
  __device__ __forceinline__ PhiloxBlock block(int slot, uint32_t index) const {
    return philox(dropout.key0, dropout.key1, dropout.counter(batch, head, row + S::row(slot), index));
  }

  // A lane computes one Philox block for every two rows and 32 columns. In an Accumulator the lane holds the
  // block's columns; for a PermutedAccumulator the lanes of a row exchange the numbers.
  template <class S>
  __device__ __forceinline__ KeptElements<S> elements_of_blocks() const {
    const uint32_t lane = threadIdx.x % 4;
    const uint32_t first = first_index();
    KeptElements<S> result;
#pragma unroll
    for (int n = 0; n < S::kColumnTiles; n += 4) {
      PhiloxBlock x;
#pragma unroll
      for (int slot = 0; slot < S::kSlots; ++slot) {
        if (slot % 2 == 0) {
          x = block<S>(slot, first + n);
        } else {
          for (uint32_t& word : x.word) word = Dropout::rotated(word);
        }
        uint32_t bits = 0;
#pragma unroll
        for (int i = 0; i < 8; ++i)
          bits |= uint32_t{(x.word[i / 2] >> i % 2 * 16 & (kDropoutNumbers - 1)) >= dropout.threshold} << i;
        if constexpr (S::kPermuted) {
          bits <<= 8 * lane;
          bits |= __shfl_xor_sync(~0u, bits, 1);
          bits |= __shfl_xor_sync(~0u, bits, 2);
          bits >>= 2 * lane;
          bits = (bits & 3) | (bits >> 6 & 0xC) | (bits >> 12 & 0x30) | (bits >> 18 & 0xC0);
        }
        result.set_group(slot, n, bits);
      }
    }
    return result;
  }

  // A lane of a transposed S holds four of the 16 numbers of a block: two rows, 8 apart, and two keys; the
  // lane 4 further on holds the adjacent (odd or even) rows. Both lanes need the blocks of two adjacent rows,
  // so each of them draws one block.
  template <class S>
  __device__ __forceinline__ KeptElements<S> elements_of_transposed_blocks() const {
    const uint32_t lane = static_cast<uint32_t>(ptx::thread_index()) % 32, odd = lane / 4 % 2;
    const uint32_t threshold = pair_of(dropout.threshold);
    KeptElements<S> result;
#pragma unroll
    for (int n = 0; n < S::kColumnTiles; ++n) {
      const uint32_t column = key + S::column_step(n) + dropout.column,
                     index = column / kDropoutColumns * 4 + lane / 8;
      // Which half of the block's columns.
      const bool upper = column % kDropoutColumns >= kDropoutColumns / 2;
#pragma unroll
      for (int slot = 0; slot < S::kSlots; slot += 4) {
        const uint32_t i = row + S::row_step(slot) + lane % 4 * 2 + odd;
        const PhiloxBlock block = philox(dropout.key0, dropout.key1, dropout.counter(batch, head, i, index));
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          exchange_rows(upper ? block.word[2 + e] : block.word[e], odd, threshold,
                        [&](int pair, uint32_t mask) { result.set_rows(slot + 2 * pair, n, e, mask); });
        }
      }
    }
    return result;
  }

  template <class S>
  __device__ __forceinline__ KeptElements<S> elements_one_by_one() const {
    KeptElements<S> result;
#pragma unroll
    for (uint32_t& word : result.bits) {
      const int first = static_cast<int>(&word - result.bits) * 32;
#pragma unroll 1
      for (int bit = 0; bit < min(32, KeptElements<S>::kCount - first); ++bit) {
        const int at = S::kTransposed ? first / 2 + bit % 16 : first + bit;
        const int of_row =
            S::kTransposed ? at / (2 * S::kColumnTiles) * 2 + bit / 16 : at / (2 * S::kColumnTiles);
        const int n = at / 2 % S::kColumnTiles;
        const bool kept = dropout.keep(batch, head, row + S::row(of_row), key + S::column(n, at % 2));
        word |= uint32_t{kept} << bit;
      }
    }
    return result;
  }
};

// P ← drop(P), rounded to 16 bits in the fragments of a P V.
template <class Fragments, class S>
__device__ __forceinline__ void drop_fragments(Fragments& p, const KeptTile<S>& kept) {
#pragma unroll
  for (int k = 0; k < S::kColumnTiles / 2; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) p.x[0][k][i] &= kept.mask(i % 2, 2 * k + i / 2);
}

// P where dropout keeps it, else 0, rounded to T.
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

// The factor by which dropout multiplies the elements that it keeps.
JF_HD float dropout_scale(const AttentionSpec& spec) {
  return spec.has(Operand::kDropout) ? 1.0f / (1.0f - spec.dropout_rate) : 1.0f;
}

// Adds dropout to a score variant of S.
template <class Score, class S>
struct WithDropout : Score {
  static constexpr bool kDropout = true;
  static constexpr bool reads(Operand operand) {
    return operand == Operand::kDropout || Score::reads(operand);
  }
  KeptTile<S> kept;  // only in the forward, in kernels that draw the numbers of a whole tile at once
  KeptElements<S> kept_elements;  // only in the backward

  // kept ← the numbers of the tile whose first key is `key`.
  template <class Tile>
  __device__ __forceinline__ void draw(const Tile& tile, int32_t key) {
    kept = tile.operands().dropout_at(tile.row(), key).template numbers<S>();
  }
  template <class Tile>
  __device__ __forceinline__ void draw_one_by_one(const Tile& tile, int32_t key) {
    kept = tile.operands().dropout_at(tile.row(), key).template numbers_one_by_one<S>();
  }
  template <class Fragments>
  __device__ __forceinline__ void drop(Fragments& p) const {
    drop_fragments(p, kept);
  }

  template <class Tile>
  __device__ __forceinline__ void prefetch_gradient(const Tile& tile) {
    Score::prefetch_gradient(tile);
    if (!tile.p.dropout) return;  // the general backward also serves calls without dropout
    kept_elements = tile.operands().dropout_at(tile.row(), tile.key).template elements<S>();
  }
  template <class Tile>
  __device__ __forceinline__ void drop_gradient(S& dp, const Tile& tile) {
    if (!tile.p.dropout) return;
    const float factor = dropout_scale(tile.p.spec);
    for_each(dp,
             [&](float& x, int slot, int n, int e) { x = kept_elements.at(slot, n, e) ? x * factor : 0; });
  }
  // Both steps at once for a transposed S: dP ← drop(P) ∘ dP − P ∘ delta, P ← drop(P), with delta · (1 −
  // rate) in `rows`. This is dS without the factor 1 / (1 − rate), which is left to the scales of dQ and dK.
  template <class Rows>
  __device__ __forceinline__ void drop_all(S& s, S& dp, const Rows& rows) const {
    for_each(s, [&](float& x, int slot, int n, int e) {
      float ds = -x * rows.delta(slot);
      kept_elements.multiply_add(slot, n, e, x, dp.at(slot, n, e), ds);
      dp.at(slot, n, e) = ds;
    });
  }
  template <class Tile>
  __device__ __forceinline__ void drop_weights(S& s, const Tile& tile) const {
    if (tile.p.dropout) kept_elements.drop(s, 0, S::kColumnTiles);
  }
  template <class Tile>
  __device__ __forceinline__ void mark_dropped(S& x, const Tile& tile) const {
    if (!tile.p.dropout) return;
    for_each(x, [&](float& w, int slot, int n, int e) { w = kept_elements.at(slot, n, e) ? w : -w; });
  }
};

// The score with dropout alone.
template <class S>
struct DropoutScore : WithDropout<ScoreVariant<S>, S> {
  static constexpr bool kDropoutInSoftmax = true, kPositional = true;

  template <bool kScalarDropout = false, class Tile>
  __device__ __forceinline__ void prefetch(const Tile& tile, int32_t key) {
    if constexpr (kScalarDropout) this->draw_one_by_one(tile, key);
  }
  // The numbers are drawn between the row maxima and the exponentials. Both are long chains of dependent
  // instructions, so each fills the other's stalls.
  template <bool kScalarDropout, class Scores, class Tile, class Softmax>
  __device__ __forceinline__ void exponentiate(Scores& s, const Tile& tile, Softmax& softmax,
                                               float (&alpha)[S::kSlots], int early) {
    softmax.update(s, alpha);
    if constexpr (!kScalarDropout) this->draw(tile, tile.key);
    softmax.exponentiate(s, 0, early);
  }
};

}  // namespace jax_flash
