// append_kv for a range of KV heads: copies new keys and values into the pages and applies the rotary
// embedding to the keys.
#pragma once

#include "isa.h"
// isa.h goes first: it makes the core force-inlined.
#include "../core/paging.h"
#include "../core/problem.h"
#include "../core/rotary.h"
#include "../core/sequence.h"
#include "convert.h"
#include "kernels.h"

namespace jax_flash::JF_ISA {

// The new keys (or values), from the first of a range of KV heads on, and the pool that they are written to.
struct AppendStream {
  const char* from;  // row 0 of the first sequence
  char* to;          // slot 0 of page 0
  const View *rows, *pool;
  int32_t width;
  float* scales;  // of page 0; in float8 pools stored = value / scale
  int64_t scale_stride, scale_page;
};

struct AppendHeads {
  const AppendProblem& p;
  int64_t leading;
  int32_t head, heads;

  JF_HD AppendStream stream(const View& rows, const View& pool, const View& scale, int32_t width) const {
    const int64_t from = rows.leading_offset(p.leading, leading) + head * rows.head;
    const int64_t to = pool.leading_offset(p.leading, leading) + head * pool.head;
    const int64_t at = scale.leading_offset(p.leading, leading) + head * scale.head;
    return {rows.as<const char>() + from * size_of(p.dtype),
            pool.as<char>() + to * size_of(p.pool_dtype),
            &rows,
            &pool,
            width,
            scale ? scale.as<float>() + at : nullptr,
            scale.head,
            scale.batch};
  }

  // Applies the rotary embedding to the first 2 · rotated features of x, in place.
  JF_HD void rotate_row(int32_t position, float* x) const {
    const int32_t row = rotary_row(position, p.positions);
    const float* cos = p.cos.as<const float>() + p.cos.leading_offset(p.leading, leading) + row * p.cos.row;
    const float* sin = p.sin.as<const float>() + p.sin.leading_offset(p.leading, leading) + row * p.sin.row;
    for (int32_t i = 0; i < p.rotated; ++i) {
      const RotaryPair pair = rotary_pair(i, p.rotated, p.spec.interleaved);
      rotate(x[pair.first], x[pair.second], cos[i], sin[i]);
    }
  }

  // Writes row `from` of the new keys or values to its slot; `rotates` is set for keys with a rotary
  // embedding.
  JF_HD void write(const AppendStream& s, int64_t from, PageSlot at, int32_t position, bool rotates) const {
    const char* source = s.from + from * size_of(p.dtype);
    char* to = s.to + (at.page * s.pool->batch + at.slot * s.pool->row) * size_of(p.pool_dtype);
    const bool copy = p.dtype == p.pool_dtype && !rotates;
    if (copy && s.rows->head == s.width && s.pool->head == s.width) {  // all heads are contiguous
      __builtin_memcpy(to, source, int64_t{heads} * s.width * size_of(p.dtype));
      return;
    }
    for (int32_t h = 0; h < heads; ++h) {
      const char* row = source + h * s.rows->head * size_of(p.dtype);
      char* slot = to + h * s.pool->head * size_of(p.pool_dtype);
      if (copy) {
        __builtin_memcpy(slot, row, s.width * size_of(p.dtype));
      } else {
        const float* scale = s.scales ? s.scales + at.page * s.scale_page + h * s.scale_stride : nullptr;
        convert(s, row, slot, position, rotates, scale ? *scale : 1.0f);
      }
    }
  }

  JF_HD void convert(const AppendStream& s, const char* from, char* to, int32_t position, bool rotates,
                     float scale) const {
    alignas(64) float x[kMaxPoolColumns];
    load_new(s, from, position, rotates, x);
    if (p.dtype != p.pool_dtype) {
      for (int32_t c = 0; c < s.width; ++c) x[c] /= scale;
    }
    store_row(p.pool_dtype, to, s.width, x, 1.0f);
  }

  // A new key or value, rotated.
  JF_HD void load_new(const AppendStream& s, const char* from, int32_t position, bool rotates,
                      float* x) const {
    load_row(p.dtype, from, s.width, 1.0f, x, round_up(s.width, kLanes));
    if (!rotates) return;
    rotate_row(position, x);
    if (p.dtype != p.pool_dtype) round_row(s.width, x);
  }

  // Rounds a rotated key to the keys' dtype before it is quantised, so that apply_rotary followed by
  // append_kv gives the same bits.
  JF_HD void round_row(int32_t width, float* x) const {
    alignas(64) char rounded[kMaxPoolColumns * 4];
    store_row(p.dtype, rounded, width, x, 1.0f);
    load_row(p.dtype, rounded, width, 1.0f, x, round_up(width, kLanes));
  }

  // Writes the `count` rows that begin with row `from` to a page of a pool with dynamic scales.
  JF_HD void write_page(const AppendStream& s, int64_t from, int32_t count, PageSlot at, int32_t position,
                        bool rotates) const {
    for (int32_t h = 0; h < heads; ++h) {
      const char* row = s.from + (from + h * s.rows->head) * size_of(p.dtype);
      const int64_t row_bytes = s.rows->row * size_of(p.dtype), slot_bytes = s.pool->row;
      char* page = s.to + at.page * s.pool->batch + h * s.pool->head;
      float& scale = s.scales[at.page * s.scale_page + h * s.scale_stride];
      float largest = 0;
      for (int32_t t = 0; t < count; ++t) {
        const float of_row = largest_of(s, row + t * row_bytes, position + t, rotates);
        largest = of_row > largest ? of_row : largest;
      }
      const PageScale found(scale, at.slot, largest, p.pool_dtype);
      for (int32_t slot = 0; slot < at.slot && found.before != found.after; ++slot) {
        alignas(64) float x[kMaxPoolColumns];
        char* const stored = page + slot * slot_bytes;
        load_row(p.pool_dtype, stored, s.width, found.factor(), x, round_up(s.width, kLanes));
        store_row(p.pool_dtype, stored, s.width, x, 1.0f);
      }
      scale = found.after;
      for (int32_t t = 0; t < count; ++t) {
        convert(s, row + t * row_bytes, page + (at.slot + t) * slot_bytes, position + t, rotates, scale);
      }
    }
  }

  // The largest finite magnitude of a new key or value.
  JF_HD float largest_of(const AppendStream& s, const char* from, int32_t position, bool rotates) const {
    alignas(64) float x[kMaxPoolColumns];
    load_new(s, from, position, rotates, x);
    uint32_t largest = 0;
    for (int32_t c = 0; c < s.width; ++c) {
      const uint32_t bits = float_bits(x[c]) & 0x7FFFFFFFu;
      largest = bits < 0x7F800000u && bits > largest ? bits : largest;
    }
    return float_of_bits(largest);
  }
};

// Writes tokens in order. If a table sends two tokens to one slot, the later one wins, with any number of
// threads.
static void append(const AppendProblem& p, int64_t leading, int32_t head, int32_t heads) {
  const AppendHeads h{p, leading, head, heads};
  const AppendStream key = h.stream(p.key, p.k_pages, p.k_scale, p.head_dim);
  const AppendStream value = h.stream(p.value, p.v_pages, p.v_scale, p.value_dim);
  const int32_t capacity = table_capacity(p.table, p.page_size);
  const int64_t lengths = p.kv_lengths.leading_offset(p.leading, leading);
  const int32_t* cu = p.packed()
                          ? p.cu_seqlens.as<const int32_t>() + p.cu_seqlens.leading_offset(p.leading, leading)
                          : nullptr;
  int32_t start = cu ? clamp_index(cu[0], p.q_rows) : 0;
  for (int32_t z = 0; z < p.batch; ++z) {
    int32_t count = p.q_rows;
    if (cu) {
      const int32_t end = max(start, clamp_index(cu[(z + 1) * p.cu_seqlens.batch], p.q_rows));
      count = end - start;
    }
    const int32_t length = length_at(p.kv_lengths, lengths, z, capacity);
    const PageTable table = page_table(p.block_tables, p.leading, leading, z, p.page_size, p.pages);
    for (int32_t t = 0; t < min(count, capacity - length); ++t) {
      const PageSlot at = table.at(length + t);
      const int64_t key_row = z * p.key.batch + (start + t) * p.key.row;
      const int64_t value_row = z * p.value.batch + (start + t) * p.value.row;
      if (p.dynamic) {  // all tokens of a page at once
        const int32_t of_page = min(min(count, capacity - length) - t, p.page_size - at.slot);
        if (table.in_pool(at.page)) {
          h.write_page(key, key_row, of_page, at, length + t, p.rotated > 0);
          h.write_page(value, value_row, of_page, at, length + t, false);
        }
        t += of_page - 1;
      } else if (table.in_pool(at.page)) {
        h.write(key, key_row, at, length + t, p.rotated > 0);
        h.write(value, value_row, at, length + t, false);
      }
    }
    if (cu) start += count;
  }
}

}  // namespace jax_flash::JF_ISA
