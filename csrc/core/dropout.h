// Dropout bits: a pure function of the key and of the global position, so that tiles, shards and passes
// agree.
#pragma once

#include <cmath>
#include <cstdint>

#include "philox.h"
#include "spec.h"
#include "views.h"

namespace jax_flash {

// One Philox block decides about what a thread holds of 16 rows and 32 columns in an accumulator of the
// tensor cores: columns 2t and 2t + 1 of each 8, by a half each of a word, and rows i and i + 8, whose
// numbers are those of the words turned by a byte. A number is the lower 15 bits of a half: as float16 such
// numbers are in the same order up to infinity, and a GPU compares two at a time. No two have the same upper
// byte; a lower byte is another's upper one, and matters where the upper one equals the threshold's.
inline constexpr int kDropoutColumns = 32, kDropoutRows = 16;
inline constexpr uint32_t kDropoutNumbers = 1 << 15, kDropoutInfinity = 0x7C00;

struct Dropout {
  uint32_t key0 = 0, key1 = 0;
  uint32_t batch = 0, head = 0, row = 0, column = 0;  // offsets of this shard
  uint32_t threshold = 0;                             // keep when the number reaches it
  float scale = 1.0f;                                 // of what is kept: 1 / (1 - rate)

  // Whether the shard begins within a block, or the threshold lies beyond what float16 puts in order.
  JF_HD bool odd() const {
    return column % kDropoutColumns != 0 || row % kDropoutRows != 0 || threshold > kDropoutInfinity;
  }

  // The block of global column c among those of its row.
  JF_HD static uint32_t index(uint32_t c) { return c / kDropoutColumns * 4 + c / 2 % 4; }
  JF_HD PhiloxBlock counter(uint32_t b, uint32_t h, uint32_t i, uint32_t index) const {
    const uint32_t r = i + row;
    return {{index, r / kDropoutRows * 8 + r % 8, h + head, b + batch}};
  }
  // Whether row i is the second of its block.
  JF_HD bool second(uint32_t i) const { return (i + row) % kDropoutRows >= 8; }
  // A word of the second row, from that of the first.
  JF_HD static uint32_t turned(uint32_t word) { return word >> 8 | word << 24; }

  // Selected without indexing: on a GPU a run-time index would move the block to local memory.
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
      for (uint32_t& word : numbers.word) word = turned(word);
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
