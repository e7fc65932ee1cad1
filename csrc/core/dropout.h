// Dropout bits are a pure function of the dropout key and of the global position, so that tiles, shards and
// passes agree.
#pragma once

#include <cmath>
#include <cstdint>

#include "philox.h"
#include "spec.h"
#include "views.h"

namespace jax_flash {

// One Philox block decides the elements of a 16 × 32 tile of S that one thread has in tensor core
// accumulators (mma.m16n8): columns 2t and 2t + 1 of each 8 columns, and rows i and i + 8. Each element uses
// one half of a word; row i + 8 uses the words of row i rotated right by a byte. An element's number is the
// lower 15 bits of its half. Read as float16, such numbers keep their order up to infinity, so a GPU compares
// two at a time. Within a block all numbers have different upper bytes. The lower byte of a number is the
// upper byte of another, but it matters only if the upper byte equals the threshold's.
inline constexpr int kDropoutColumns = 32, kDropoutRows = 16;
inline constexpr uint32_t kDropoutNumbers = 1 << 15, kDropoutInfinity = 0x7C00;

struct Dropout {
  uint32_t key0 = 0, key1 = 0;
  uint32_t batch = 0, head = 0, row = 0, column = 0;  // global offsets of this shard
  uint32_t threshold = 0;                             // keep where number >= threshold
  float scale = 1.0f;                                 // factor of kept elements, 1 / (1 - rate)

  // Whether elements need one number at a time: if the shard begins inside a block, or if the threshold is
  // above the numbers that float16 orders.
  JF_HD bool needs_scalar_path() const {
    return column % kDropoutColumns != 0 || row % kDropoutRows != 0 || threshold > kDropoutInfinity;
  }

  // The index of the block of global column c within its row.
  JF_HD static uint32_t index(uint32_t c) { return c / kDropoutColumns * 4 + c / 2 % 4; }
  JF_HD PhiloxBlock counter(uint32_t b, uint32_t h, uint32_t i, uint32_t index) const {
    const uint32_t r = i + row;
    return {{index, r / kDropoutRows * 8 + r % 8, h + head, b + batch}};
  }
  // Whether row i is one of the last 8 of its block's 16 rows.
  JF_HD bool second(uint32_t i) const { return (i + row) % kDropoutRows >= 8; }
  // The word for row i + 8, from the word for row i.
  JF_HD static uint32_t rotated(uint32_t word) { return word >> 8 | word << 24; }

  // Selects without indexing: on a GPU a run-time index would move the block to local memory.
  JF_HD static uint32_t half(const PhiloxBlock& numbers, uint32_t column) {
    const uint32_t low = column & 8 ? numbers.word[1] : numbers.word[0];
    const uint32_t high = column & 8 ? numbers.word[3] : numbers.word[2];
    return (column & 16 ? high : low) >> column % 2 * 16 & (kDropoutNumbers - 1);
  }

  // b: batch entry or sequence, h: query head, (i, j): position within the sequence.
  JF_HD bool keep(uint32_t b, uint32_t h, uint32_t i, uint32_t j) const {
    const uint32_t c = j + column;
    PhiloxBlock numbers = philox(key0, key1, counter(b, h, i, index(c)));
    if (second(i)) {
      for (uint32_t& word : numbers.word) word = rotated(word);
    }
    return half(numbers, c) >= threshold;
  }
};

JF_HD Dropout make_dropout(const AttentionSpec& spec, const View& operand, int64_t leading_offset) {
  const uint32_t* x = operand.as<const uint32_t>() + leading_offset;
  const int64_t s = operand.column;
  return {x[0],
          x[s],
          x[2 * s],
          x[3 * s],
          x[4 * s],
          x[5 * s],
          static_cast<uint32_t>(rintf(spec.dropout_rate * kDropoutNumbers)),
          1.0f / (1.0f - spec.dropout_rate)};
}

}  // namespace jax_flash
