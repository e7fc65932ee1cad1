// The rows of a batch entry (fixed) or of a packed sequence (varlen), clamped to the operands whatever the
// index arrays hold.
#pragma once

#include "problem.h"
#include "views.h"

namespace jax_flash {

JF_HD int32_t clamp_index(int32_t x, int32_t limit) { return x < 0 ? 0 : x > limit ? limit : x; }

// Rows [q_begin, q_begin + q_len) of the query operand attend to rows [k_begin, k_begin + k_len) of key and
// value (paged: to keys [0, k_len) of row `index` of the block tables).
struct Sequence {
  int32_t index;      // batch entry or sequence: index into lengths, tables, alibi and dropout
  int32_t batch_row;  // batch index of the per-token operands: `index` if fixed, 0 if packed
  int32_t q_begin, k_begin;
  int32_t q_len, k_len;
};

JF_HD int32_t length_at(const View& lengths, int64_t leading_offset, int32_t index, int32_t limit) {
  if (!lengths) return limit;
  return clamp_index(lengths.as<const int32_t>()[leading_offset + index * lengths.batch], limit);
}

JF_HD Sequence fixed_sequence(const Problem& p, int64_t leading, int32_t index) {
  const int32_t q_len =
      length_at(p.q_lengths, p.q_lengths.leading_offset(p.leading, leading), index, p.q_rows);
  const int32_t k_len =
      length_at(p.kv_lengths, p.kv_lengths.leading_offset(p.leading, leading), index, p.k_rows);
  return {index, index, 0, 0, q_len, k_len};
}

// A packed sequence, from clamped starts: [batch + 1], never decreasing, within [0, rows] (see
// clamp_starts).
JF_HD Sequence varlen_sequence(const Problem& p, int64_t leading, int32_t index, const int32_t* q_starts,
                               const int32_t* k_starts) {
  const int32_t k_rows = k_starts[index + 1] - k_starts[index];
  const int64_t offset = p.kv_lengths.leading_offset(p.leading, leading);
  return {index,
          0,
          q_starts[index],
          k_starts[index],
          q_starts[index + 1] - q_starts[index],
          length_at(p.kv_lengths, offset, index, k_rows)};
}

// A sequence of packed queries whose keys lie in pages: key positions of every sequence start at 0.
JF_HD Sequence paged_sequence(const Problem& p, int64_t leading, int32_t index, const int32_t* q_starts) {
  const int64_t offset = p.kv_lengths.leading_offset(p.leading, leading);
  return {index,
          0,
          q_starts[index],
          0,
          q_starts[index + 1] - q_starts[index],
          length_at(p.kv_lengths, offset, index, p.k_rows)};
}

// starts[i] = running maximum of cu_seqlens [n + 1], each clamped to [0, rows].
JF_HD void clamp_starts(const int32_t* cu_seqlens, int64_t stride, int32_t n, int32_t rows, int32_t* starts) {
  int32_t last = 0;
  for (int32_t i = 0; i <= n; ++i) {
    const int32_t x = clamp_index(cu_seqlens[i * stride], rows);
    last = x > last ? x : last;
    starts[i] = last;
  }
}

// Slots for tiles of packed rows, without a prefix sum over the sequences. Sequence z owns the slots from
// start(z) / tile + z up to the first slot of sequence z + 1. It has at least one slot for each of its tiles;
// the others stay empty.
JF_HD int64_t first_slot(int32_t start, int32_t tile, int32_t index) { return start / tile + index; }

JF_HD int64_t slot_count(int32_t rows, int32_t tile, int32_t n) { return rows / tile + n; }

// The sequence that owns `slot` (>= first_slot of sequence 0), n >= 1.
JF_HD int32_t sequence_of_slot(const int32_t* starts, int32_t n, int32_t tile, int64_t slot) {
  int32_t lo = 0, hi = n - 1;
  while (lo < hi) {
    const int32_t mid = lo + (hi - lo + 1) / 2;
    if (first_slot(starts[mid], tile, mid) <= slot) {
      lo = mid;
    } else {
      hi = mid - 1;
    }
  }
  return lo;
}

}  // namespace jax_flash
