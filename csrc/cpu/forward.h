// Forward of one tile of queries: online softmax over tiles of the visible keys, whole or in parts that are
// merged afterwards.
#pragma once

#include "../core/split.h"
#include "head.h"
#include "kernels.h"

namespace jax_flash::JF_ISA {

// The softmax of a tile of rows: m the maximum of S, l = Σ exp(unit (S − m)), alpha the last rescale.
struct SoftmaxState {
  float m[kTileM], l[kTileM];
  alignas(64) float alpha[kTileM];
};

// The columns of tile [j0, j0 + n) that each block of rows uses, and whether any does. `heads` rows share a
// position.
JF_INLINE bool used_columns(const Band& band, int32_t i0, int32_t blocks, int32_t j0, int32_t n,
                            Columns* used, int32_t heads = 1) {
  bool any = false;
  for (int32_t b = 0; b < blocks; ++b) {
    const int32_t first = b * kBlockRows / heads, end = ((b + 1) * kBlockRows + heads - 1) / heads;
    const Interval keys = intersect(band.rows(i0 + first, i0 + end), {j0, j0 + n});
    used[b] = keys.empty() ? Columns{0, 0} : Columns{keys.lo - j0, keys.hi - j0};
    any |= !keys.empty();
  }
  return any;
}

// The columns of tile [j0, j0 + n) that row i sees.
JF_INLINE Columns visible_columns(const Band& band, int32_t i, int32_t j0, int32_t n) {
  const Interval keys = intersect(band.row(i), {j0, j0 + n});
  return keys.empty() ? Columns{0, 0} : Columns{keys.lo - j0, keys.hi - j0};
}

// Final scores on whole vectors around `visible`, -inf at the edges that the row does not see.
JF_INLINE void final_scores(const Head& head, Row row, int32_t j0, Columns visible, float* s, float* slopes) {
  if (head.extra) head.finish_scores(row, j0, visible, s, slopes);
  const Columns whole = vectors(visible);
  for (int32_t c = whole.lo; c < visible.lo; ++c) s[c] = kNegInf;
  for (int32_t c = visible.hi; c < whole.hi; ++c) s[c] = kNegInf;
}

JF_INLINE void clear(float* row, int32_t lo, int32_t hi) {
  for (int32_t c = lo; c < hi; ++c) row[c] = 0.0f;
}

// S -> P in place for one row: m ← max(m, S), P = exp(unit (S − m)), l ← αl + ΣP. Zeros the rest of [used.lo,
// used.hi).
static void softmax_row(const Head& head, Row row, int32_t j0, int32_t n, Columns used, float* s,
                        SoftmaxState& state, int32_t r) {
  const Columns visible = visible_columns(head.band, row.position, j0, n), whole = vectors(visible);
  state.alpha[r] = 1.0f;
  if (visible.hi <= visible.lo) return clear(s, used.lo, used.hi);
  clear(s, used.lo, whole.lo);
  clear(s, whole.hi, used.hi);
  final_scores(head, row, j0, visible, s, nullptr);

  Float top = broadcast(kNegInf);
  for (int32_t c = whole.lo; c < whole.hi; c += kLanes) top = max(load(s + c), top);
  const float highest = reduce_max(top), m = highest > state.m[r] ? highest : state.m[r];
  const float zero = m == kNegInf ? 0.0f : m;  // all hidden so far: P = exp(−inf − 0) = 0
  const float unit = head.unit * kLog2e;
  Float sum{};
  for (int32_t c = whole.lo; c < whole.hi; c += kLanes) {
    const Float p = exp2((load(s + c) - zero) * unit);
    sum += p;
    store(s + c, p);
  }
  const float alpha = exp2(broadcast((state.m[r] - zero) * unit))[0];
  state.alpha[r] = alpha;
  state.l[r] = state.l[r] * alpha + reduce_sum(sum);
  state.m[r] = m;
  if (head.drops) {
    RowBuffer keep;
    head.dropout_row(row, j0, visible, keep.value);
    for (int32_t c = visible.lo; c < visible.hi; ++c) s[c] *= keep.value[c];
  }
}

// out = O / l and lse = unit m + log l, the sink joining the sum; rows past the length are filled.
static void store_output(const Head& head, const RowTile& tile, const float* o, const SoftmaxState& state) {
  const Problem& p = head.problem;
  const Rows out = head.rows(p.out, p.value_dim, head.sequence.q_begin, head.head);
  float* lse = head.row_statistic(p.lse);
  for (int32_t r = 0; r < tile.rows(); ++r) {
    const Row row{tile.position(r), tile.head_of(r)};
    const int32_t h = row.head - head.head;
    float factor = 0.0f, statistic = kNegInf;
    if (row.position < head.band.q_len) {
      float m = state.m[r] * head.unit, l = state.l[r], alpha = 1.0f;
      if (p.sinks) {
        const SplitMerge merged = merge_splits(m, head.at(p.sinks, row.head * p.sinks.head), 1.0f);
        alpha = merged.first;
        l = l * alpha + merged.second;
        m = merged.m;
      }
      if (l != 0.0f) {
        factor = alpha / l;
        statistic = m + logf(l);
      }
    }
    char* to = out.at(row.position) + h * p.out.head * size_of(out.dtype);
    store_row(out.dtype, to, out.width, o + r * padded(p.value_dim), factor);
    lse[h * p.lse.head + row.position * p.lse.row] = statistic;
  }
}

// Up to this many rows, packing K and V would cost more than the products.
inline constexpr int32_t kFewRows = 2 * kBlockRows;

// What a tile of queries has at hand while it walks its keys.
struct ForwardTile {
  Head head;
  const RowTile& tile;
  int32_t rows, count, blocks;                // count: rows rounded up to whole blocks
  float *q, *s, *keys, *panels, *o, *o_part;  // o, o_part: [count, padded(dv)]

  ForwardTile(const Problem& p, const RowTile& t, float* memory)
      : head(p, t.leading, t.sequence, t.head), tile(t), rows(t.rows()) {
    count = round_up(rows, kBlockRows);
    blocks = count / kBlockRows;
    const int32_t ld = padded(p.head_dim), ldv = padded(p.value_dim), widest = ld > ldv ? ld : ldv;
    Scratch scratch{memory};
    q = scratch.take(kTileM * ld);
    s = scratch.take(kTileM * kTileN);
    o = scratch.take(kTileM * ldv);
    o_part = scratch.take(kTileM * ldv);
    keys = scratch.take(kTileN * widest);
    panels = scratch.take(kTileN * widest);

    const char* at[kTileM] = {};
    const int64_t head_bytes = p.query.head * size_of(p.dtype);
    for (int32_t r = 0; r < rows; ++r) {
      const int32_t i = t.position(r);
      if (i < head.band.q_len) at[r] = head.query.at(i) + (t.head_of(r) - t.head) * head_bytes;
    }
    gather_rows(at, rows, count, head.query, head.query_sign, q);
  }

  Interval visible() const { return head.band.rows(tile.begin, tile.end); }
};

// The softmax state and unnormalised O [count, padded(dv)] of the tile over some of its keys.
static void attend(const ForwardTile& t, Interval keys, SoftmaxState& state, float* o) {
  const Problem& p = t.head.problem;
  const int32_t d = p.head_dim, dv = p.value_dim;
  const bool few = t.rows <= kFewRows;
  for (int32_t r = 0; r < t.count; ++r) state.m[r] = kNegInf, state.l[r] = 0.0f, state.alpha[r] = 1.0f;
  fill(o, t.count * padded(dv), 0.0f);
  for (int32_t j0 = keys.lo; j0 < keys.hi; j0 += kTileN) {
    const int32_t n = min(keys.hi - j0, kTileN);
    Columns used[kMaxBlocks];
    if (!used_columns(t.head.band, t.tile.begin, t.blocks, j0, n, used, t.tile.heads)) continue;
    load_rows(t.head.key, j0, j0 + n, round_up(n, kLanes), 1.0f, t.keys);
    if (few) {
      multiply_few(t.q, t.rows, t.keys, n, d, t.s);  // S = Q Kᵀ
    } else {
      pack_transposed(t.keys, n, d, t.panels);
      multiply_scores(t.q, t.panels, d, used, t.blocks, n, t.s);
    }
    for (int32_t r = 0; r < t.count; ++r) {
      const Columns block = used[r / kBlockRows];
      float* s = t.s + r * kTileN;
      if (r < t.rows && block.lo < block.hi) {
        softmax_row(t.head, {t.tile.position(r), t.tile.head_of(r)}, j0, n, block, s, state, r);
      } else {
        clear(s, block.lo, block.hi);
      }
    }
    load_rows(t.head.value, j0, j0 + n, n, 1.0f, t.keys);
    if (few) {
      multiply_values<Start::kRescale, false>(t.s, t.keys, n, dv, used, t.blocks, o,
                                              state.alpha);  // O ← αO + P V
    } else {
      pack_columns(t.keys, n, dv, t.panels);
      multiply_values<Start::kRescale>(t.s, t.panels, n, dv, used, t.blocks, o, state.alpha);
    }
  }
}

// (state, o) ← its union with another part's. Not inlined: parts give the same bits whoever merges them.
static __attribute__((noinline)) void merge_part(int32_t rows, int32_t width, float unit, SoftmaxState& state,
                                                 float* o, const SoftmaxState& other, const float* o_other) {
  const int32_t ld = padded(width);
  for (int32_t r = 0; r < rows; ++r, o += ld, o_other += ld) {
    const SplitMerge merged = merge_splits(state.m[r], other.m[r], unit);
    state.l[r] = state.l[r] * merged.first + other.l[r] * merged.second;
    state.m[r] = merged.m;
    for (int32_t c = 0; c < ld; c += kLanes) {
      store(o + c, load(o + c) * merged.first + load(o_other + c) * merged.second);
    }
  }
}

static void forward(const Problem& p, const RowTile& tile, float* memory) {
  const ForwardTile t(p, tile, memory);
  const Interval keys = t.visible();
  SoftmaxState state, other;
  attend(t, split_part(keys, 0, tile.parts), state, t.o);
  for (int32_t part = 1; part < tile.parts; ++part) {
    attend(t, split_part(keys, part, tile.parts), other, t.o_part);
    merge_part(t.rows, p.value_dim, t.head.unit, state, t.o, other, t.o_part);
  }
  store_output(t.head, tile, t.o, state);
}

// A part in memory: O [count, padded(dv)], then m and l [count].
static int64_t part_floats(const Problem& p, const RowTile& tile) {
  return int64_t{round_up(tile.rows(), kBlockRows)} * (padded(p.value_dim) + kPanel);
}

static void forward_part(const Problem& p, const RowTile& tile, int32_t part, float* to, float* memory) {
  const ForwardTile t(p, tile, memory);
  SoftmaxState state;
  attend(t, split_part(t.visible(), part, tile.parts), state, to);
  float* statistics = to + t.count * padded(p.value_dim);
  for (int32_t r = 0; r < t.count; ++r) {
    statistics[r] = state.m[r];
    statistics[t.count + r] = state.l[r];
  }
}

static void combine_parts(const Problem& p, const RowTile& tile, float* parts) {
  const Head head(p, tile.leading, tile.sequence, tile.head);
  const int32_t count = round_up(tile.rows(), kBlockRows);
  SoftmaxState state, other;
  const auto read = [&](const float* part, SoftmaxState& to) {
    const float* statistics = part + count * padded(p.value_dim);
    for (int32_t r = 0; r < count; ++r) to.m[r] = statistics[r], to.l[r] = statistics[count + r];
  };
  read(parts, state);
  for (int32_t part = 1; part < tile.parts; ++part) {
    const float* next = parts + part * part_floats(p, tile);
    read(next, other);
    merge_part(tile.rows(), p.value_dim, head.unit, state, parts, other, next);
  }
  store_output(head, tile, parts, state);
}

}  // namespace jax_flash::JF_ISA
