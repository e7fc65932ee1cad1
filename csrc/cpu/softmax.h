// The online softmax of a tile of rows, and what makes the output of it.
#pragma once

#include "../core/split.h"
#include "head.h"
#include "kernels.h"
#include "scores.h"

namespace jax_flash::JF_ISA {

// Of each row: m = max S over the keys so far, shift = unit log2(e) m as it was rounded once for all that
// subtract it, l = Σ 2^(unit log2(e) S − shift) lane by lane, alpha the last rescale of l and O.
struct Softmax {
  float m[kTileM], shift[kTileM];
  alignas(64) float alpha[kTileM + kLanes];
  Float l[kTileM];

  void reset() {
    for (int32_t r = 0; r < kTileM; ++r) m[r] = shift[r] = kNegInf, alpha[r] = 1.0f, l[r] = Float{};
  }
};

// The columns of `keys` that row i sees; column 0 is key j0.
JF_INLINE Columns visible_columns(const Band& band, int32_t i, Interval keys, int32_t j0) {
  keys = intersect(band.row(i), keys);
  return keys.empty() ? Columns{0, 0} : Columns{keys.lo - j0, keys.hi - j0};
}

// A block of rows in a tile of keys: `used` are the columns that any row sees, `open` the panels that every
// row sees whole.
struct BlockColumns {
  Columns used{0, 0}, open{0, 0};

  JF_HD Columns panels() const { return {round_down(used.lo, kPanel), round_up(used.hi, kPanel)}; }
};

// The keys of a tile, and the key of column 0: a multiple of kPanel at or before them.
struct KeyRange {
  Interval keys;
  int32_t begin;
};

// Of blocks whose first row is at position i0; whether any is used. `heads` rows share a position.
JF_INLINE bool block_columns(const Band& band, int32_t i0, int32_t blocks, int32_t heads, KeyRange range,
                             BlockColumns* columns) {
  const int32_t j0 = range.begin;
  bool any = false;
  for (int32_t b = 0; b < blocks; ++b) {
    const int32_t first = i0 + b * kBlockRows / heads, end = i0 + ((b + 1) * kBlockRows + heads - 1) / heads;
    const Interval keys = intersect(band.rows(first, end), range.keys);
    columns[b] = {};
    if (keys.empty()) continue;
    any = true;
    columns[b].used = {keys.lo - j0, keys.hi - j0};
    const Interval all = intersect(band.common(first, end), keys);
    columns[b].open = {round_up(all.lo - j0, kPanel), round_down(all.hi - j0, kPanel)};
    const int32_t lo = columns[b].panels().lo;
    if (all.empty() || columns[b].open.empty()) columns[b].open = {lo, lo};
  }
  return any;
}

// Addresses of the tile's rows of the queries, null past the sequence's length.
JF_INLINE void query_addresses(const Head& head, const RowTile& tile, const char** at) {
  const int64_t head_bytes = head.problem.query.head * size_of(head.problem.dtype);
  for (int32_t r = 0; r < tile.rows(); ++r) {
    const int32_t i = tile.position(r), h = tile.head_of(r) - head.head;
    at[r] = i < head.band.q_len ? head.query.at(i) + h * head_bytes : nullptr;
  }
}

// Hides the columns [lo, hi) of S that lie outside `visible`, and the maximum with `top`, lane by lane.
JF_INLINE Float hide_edges(Columns visible, int32_t lo, int32_t hi, float* s, Float top) {
  const Columns inner{round_up(visible.lo, kLanes), round_down(visible.hi, kLanes)};
  for (int32_t c = lo; c < hi; c += kLanes) {
    Float x = load(s + c);
    if (c < inner.lo || c >= inner.hi) {
      const Int column = lane_indices() + c;
      x = (column >= visible.lo) & (column < visible.hi) ? x : broadcast(kNegInf);
      store(s + c, x);
    }
    top = max(x, top);
  }
  return top;
}

// From here on rounding the shift would matter: S − m is made first.
inline constexpr float kFarShift = 1 << 20;

// Of the rows of a tile, on the way from S to P: what S is shifted by, and log2 of what l and O are rescaled
// by.
struct SoftmaxShift {
  float shift[kTileM];
  alignas(64) float change[kTileM + kLanes] = {};
};

// m ← max(m, S) for one row of a block, and by how much it has risen. `top` is the maximum of the block's
// open panels, lane by lane.
JF_INLINE void softmax_maximum(const Head& head, Row row, KeyRange range, const BlockColumns& block, float* s,
                               Float top, Softmax& state, SoftmaxShift& by, int32_t r) {
  const int32_t j0 = range.begin;
  const Columns visible = visible_columns(head.band, row.position, range.keys, j0), all = block.panels();
  if (head.extra) {
    const Columns whole = visible.empty() ? Columns{all.hi, all.hi} : vectors(visible);
    fill(s + all.lo, whole.lo - all.lo, kNegInf);
    fill(s + whole.hi, all.hi - whole.hi, kNegInf);
    top = visible.empty() ? broadcast(kNegInf) : head.finish_scores(row, j0, visible, s, nullptr);
  } else {
    top = hide_edges(visible, all.lo, block.open.lo, s, top);
    top = hide_edges(visible, block.open.hi, all.hi, s, top);
  }
  const float unit = head.unit * kLog2e, highest = reduce_max(top);
  const float m = highest > state.m[r] ? highest : state.m[r];
  by.shift[r] = m == kNegInf ? 0.0f : m * unit;  // all hidden so far: P = 2^(−inf − 0) = 0
  by.change[r] = state.shift[r] - by.shift[r];
  state.shift[r] = m == kNegInf ? kNegInf : by.shift[r];
  if (__builtin_fabsf(by.shift[r]) >= kFarShift) {
    by.change[r] = (state.m[r] - m) * unit;
    by.shift[r] = 0.0f;
    for (int32_t c = all.lo; c < all.hi; c += kLanes) store(s + c, load(s + c) - m);
  }
  state.m[r] = m;
}

// alpha of the rows.
template <class E>
JF_INLINE void softmax_rescale(int32_t rows, const SoftmaxShift& by, Softmax& state) {
  for (int32_t r = 0; r < rows; r += kLanes) {
    store(state.alpha + r, exp2_short<E::kExpDegree>(load(by.change + r)));
  }
}

// S -> P for one row of a block, P as words of E in S's place: P = exp(unit (S − m)), l ← αl + ΣP.
template <class E>
JF_INLINE void softmax_row(const Head& head, Row row, int32_t j0, const BlockColumns& block, float* s,
                           float shift, Softmax& state, int32_t r) {
  const Columns all = block.panels();
  const float unit = head.unit * kLog2e;
  Float sum = state.l[r] * state.alpha[r];
  Word* p = reinterpret_cast<Word*>(s);  // its columns are no wider than those of S
  const auto exponentials = [&](int32_t c) {
    const Float x = exp2_short<E::kExpDegree>(load(s + c) * unit - shift);
    sum += x;
    return x;
  };
  if (head.drops) {
    RowBuffer keep;
    head.dropout_row(row, j0, all, keep.value);
    for (int32_t c = all.lo; c < all.hi; c += kPanel) {
      const Float x = exponentials(c), y = exponentials(c + kLanes);
      E::store_columns(p, c, x * load(keep.value + c), y * load(keep.value + c + kLanes));
    }
  } else {
#pragma GCC unroll 2
    for (int32_t c = all.lo; c < all.hi; c += kPanel) {
      const Float x = exponentials(c);
      E::store_columns(p, c, x, exponentials(c + kLanes));
    }
  }
  state.l[r] = sum;
}

// What a tile of rows, or a part of its keys, comes to: O [rows, padded(dv)] with m and l of each row.
struct PartialOutput {
  float *o, *m, *l;

  JF_HD static int64_t floats(int32_t rows, int32_t width) { return int64_t{rows} * (padded(width) + 2); }

  JF_HD static PartialOutput at(float* memory, int32_t rows, int32_t width) {
    float* m = memory + int64_t{rows} * padded(width);
    return {memory, m, m + rows};
  }

  JF_HD void assign(int32_t rows, int32_t width, const float* from, const Softmax& state) {
    for (int32_t c = 0; c < rows * padded(width); c += kLanes) store(o + c, load(from + c));
    for (int32_t r = 0; r < rows; ++r) m[r] = state.m[r], l[r] = reduce_sum(state.l[r]);
  }
};

// out = O / l and lse = unit m + log l, the sink joining the sum; rows past the length are filled.
static void store_output(const Head& head, const RowTile& tile, const PartialOutput& from) {
  const Problem& p = head.problem;
  const Rows out = head.rows(p.out, p.value_dim, head.sequence.q_begin, tile.head);
  float* lse = head.row_statistic(p.lse) + (tile.head - head.head) * p.lse.head;
  for (int32_t r = 0; r < tile.rows(); ++r) {
    const int32_t i = tile.position(r), h = tile.head_of(r) - tile.head;
    float factor = 0.0f, statistic = kNegInf;
    if (i < head.band.q_len) {
      float m = from.m[r] * head.unit, l = from.l[r], alpha = 1.0f;
      if (p.sinks) {
        const SplitMerge merged = merge_splits(m, head.at(p.sinks, (tile.head + h) * p.sinks.head), 1.0f);
        alpha = merged.first;
        l = l * alpha + merged.second;
        m = merged.m;
      }
      if (l != 0.0f) {
        factor = alpha / l;
        statistic = m + logf(l);
      }
    }
    char* to = out.at(i) + h * p.out.head * size_of(out.dtype);
    store_row(out.dtype, to, out.width, from.o + r * padded(p.value_dim), factor);
    lse[h * p.lse.head + i * p.lse.row] = statistic;
  }
}

// first ← its union with another part's. Not inlined: parts give the same bits whoever merges them.
static __attribute__((noinline)) void merge_part(int32_t rows, int32_t width, float unit,
                                                 const PartialOutput& first, const PartialOutput& other) {
  const int32_t ld = padded(width);
  for (int32_t r = 0; r < rows; ++r) {
    const SplitMerge merged = merge_splits(first.m[r], other.m[r], unit);
    first.l[r] = first.l[r] * merged.first + other.l[r] * merged.second;
    first.m[r] = merged.m;
    float* o = first.o + r * ld;
    for (int32_t c = 0; c < ld; c += kLanes) {
      store(o + c, load(o + c) * merged.first + load(other.o + r * ld + c) * merged.second);
    }
  }
}

}  // namespace jax_flash::JF_ISA
