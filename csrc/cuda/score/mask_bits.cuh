// Packs a boolean mask into bits, 16 neighbouring keys of a row at a time.
#pragma once

#include <cstdint>

#include "core/band.h"
#include "cuda/score/ranges.cuh"

namespace jax_flash {

// The high bit of each byte that is not 0.
__device__ __forceinline__ uint32_t nonzero_bytes(uint32_t x) {
  return (((x & 0x7f7f7f7fu) + 0x7f7f7f7fu) | x) & 0x80808080u;
}

// Bit i: whether byte i is not 0. The product moves the high bits of the four bytes to its bits 28 to 31.
__device__ __forceinline__ uint32_t bits_of_bytes(uint32_t x) {
  return nonzero_bytes(x) * (1u << 21 | 1u << 14 | 1u << 7 | 1u) >> 28;
}

// The keys of [key, key + 16) that the band leaves to any row. Limits are relative to `key`, so that they fit
// 32 bits.
class BandOfKeys {
 public:
  static constexpr int kKeys = 16;

  __device__ __forceinline__ BandOfKeys(const Band& band, int32_t key)
      : begin_(limit(band.shift - band.left - key)),
        end_(limit(band.shift + band.right + 1 - key)),
        rows_(band.q_len),
        keys_(band.k_len - key) {}

  // Bit j: whether the band shows key + j to row i.
  __device__ __forceinline__ uint32_t bits(int32_t i) const {
    const int32_t lo = min(max(i + begin_, 0), kKeys), hi = max(min(min(i + end_, keys_), kKeys), lo);
    return i < rows_ ? (1u << hi) - (1u << lo) : 0;
  }

 private:
  __device__ __forceinline__ static int32_t limit(int64_t x) {
    constexpr int64_t kMost = 1 << 30;
    return static_cast<int32_t>(max(-kMost, min(kMost, x)));
  }
  int32_t begin_, end_, rows_, keys_;
};

// The mask of one head [rows, keys], broadcast by zero strides.
struct MaskRows {
  static constexpr int kKeys = BandOfKeys::kKeys;  // keys of a row that are read at a time

  const uint8_t* first;
  int64_t row, column;  // strides
  int32_t keys;         // keys in a row

  // Whether 8 keys can be loaded at once, at keys that are multiples of 8.
  __device__ __forceinline__ bool in_chunks() const {
    return column == 1 && keys % 8 == 0 && ((reinterpret_cast<uintptr_t>(first) | row) & 7) == 0;
  }

  // Bit j: whether the first row sees key + j by the mask and the band; bit 16 + j: whether the second row
  // does. `key` is a multiple of 16. No element is read if the band hides all keys of both rows.
  __device__ __forceinline__ uint32_t bits_of_two(int32_t first_row, int32_t second_row, const Band& band,
                                                  int32_t key) const {
    const BandOfKeys in_band(band, key);
    const uint32_t low = in_band.bits(first_row), high = in_band.bits(second_row);
    if (!in_chunks()) return elements(first_row, low, key) | elements(second_row, high, key) << kKeys;
    const uint4 of_low = chunks(first_row, low, key), of_high = chunks(second_row, high, key);
    return (low | high << kKeys) & (bits_of_bytes(of_low) | bits_of_bytes(of_high) << kKeys);
  }
  // Bit j: whether row i sees key + j by the mask, for the first `count` keys.
  __device__ __forceinline__ uint32_t bits_of_one(int32_t i, int32_t count, int32_t key) const {
    const uint32_t wanted = (1u << max(0, min(count, kKeys))) - 1;
    return in_chunks() ? bits_of_bytes(chunks(i, wanted, key)) & wanted : elements(i, wanted, key);
  }

 private:
  __device__ __forceinline__ static uint32_t bits_of_bytes(const uint4& x) {
    using jax_flash::bits_of_bytes;
    return bits_of_bytes(x.x) | bits_of_bytes(x.y) << 4 | bits_of_bytes(x.z) << 8 | bits_of_bytes(x.w) << 12;
  }
  // Elements [key, key + 16) of row i; each half is read only if some of its bits are `wanted`.
  __device__ __forceinline__ uint4 chunks(int32_t i, uint32_t wanted, int32_t key) const {
    const auto* const from = reinterpret_cast<const uint2*>(first + i * row + key);
    uint2 low{0, 0}, high{0, 0};
    if (wanted & 0xff) low = from[0];
    if (wanted & 0xff00) high = from[1];
    return {low.x, low.y, high.x, high.y};
  }
  // The `wanted` bits of row i, read element by element.
  __device__ __forceinline__ uint32_t elements(int32_t i, uint32_t wanted, int32_t key) const {
    const uint8_t* from = first + i * row + key * column;
    uint32_t bits = 0;
#pragma unroll 4
    for (int j = 0; j < kKeys; ++j, from += column)
      if (wanted >> j & 1) bits |= static_cast<uint32_t>(*from != 0) << j;
    return bits;
  }
};

}  // namespace jax_flash
