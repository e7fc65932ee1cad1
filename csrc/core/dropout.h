// Dropout bits: a pure function of the key and of the global position, so that tiles, shards and passes
// agree.
#pragma once

#include <cmath>
#include <cstdint>

#include "philox.h"
#include "spec.h"
#include "views.h"

namespace jax_flash {

inline constexpr int kDropoutBlock = 8;  // columns decided by one Philox block, 16 bits each

struct Dropout {
  uint32_t key0 = 0, key1 = 0;
  uint32_t batch = 0, head = 0, row = 0, column = 0;  // offsets of this shard
  uint32_t threshold = 0;                             // keep when the 16-bit number reaches it
  float scale = 1.0f;                                 // of what is kept: 1 / (1 - rate)

  // Whether the shard begins within a block.
  JF_HD bool odd() const { return column % kDropoutBlock != 0; }

  // The numbers of global columns [8 index, 8 index + 8) in row i.
  JF_HD PhiloxBlock block(uint32_t b, uint32_t h, uint32_t i, uint32_t index) const {
    return philox(key0, key1, counter(b, h, i, index));
  }
  JF_HD PhiloxBlock counter(uint32_t b, uint32_t h, uint32_t i, uint32_t index) const {
    return {{index, i + row, h + head, b + batch}};
  }

  // Selected without indexing: on a GPU a run-time index would move the block to local memory.
  JF_HD static uint32_t half(const PhiloxBlock& numbers, uint32_t column) {
    const uint32_t low = column & 2 ? numbers.word[1] : numbers.word[0];
    const uint32_t high = column & 2 ? numbers.word[3] : numbers.word[2];
    return (column & 4 ? high : low) >> column % 2 * 16 & 0xFFFFu;
  }

  // b: batch entry or sequence, h: query head, (i, j): position within the sequence.
  JF_HD bool keep(uint32_t b, uint32_t h, uint32_t i, uint32_t j) const {
    const uint32_t c = j + column;
    return half(block(b, h, i, c / kDropoutBlock), c) >= threshold;
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
          static_cast<uint32_t>(rintf(spec.dropout_rate * 65536.0f)),
          1.0f / (1.0f - spec.dropout_rate)};
}

}  // namespace jax_flash
