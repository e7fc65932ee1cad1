// The online softmax of a tile of rows, and its output O / l.
#pragma once

#include "../core/split.h"
#include "dropout.h"
#include "head.h"
#include "kernels.h"
#include "scores.h"
#include "segments.h"

namespace jax_flash::JF_ISA {

// Online softmax state per row: m = max S over the keys so far; shift = softmax_scale log2(e) m, rounded
// once, so that all exponents subtract the same value; l = Σ 2^(softmax_scale log2(e) S − shift), lane by
// lane; alpha, the last rescale factor of l and O.
struct Softmax {
  float m[kTileM], shift[kTileM];
  alignas(64) float alpha[kTileM + kLanes];
  Float l[kTileM];

  void reset() {
    for (int32_t r = 0; r < kTileM; ++r) m[r] = shift[r] = kNegInf, alpha[r] = 1.0f, l[r] = Float{};
  }
};

// A block of rows in a tile of keys. `used`: the columns from the first to the last that any row may see.
// `seen`: the panels of `used` with such columns. `unmasked`: the panels that every row sees entirely by band
// and ranges. `mixed`: the panels of which segments, masks or holes between two ranges may hide columns.
struct BlockColumns {
  Columns used{0, 0}, unmasked{0, 0};
  uint64_t seen = kAllPanels, mixed = 0;

  JF_HD Columns panels() const { return {round_down(used.lo, kPanel), round_up(used.hi, kPanel)}; }
};

// The keys of a tile, and the key of column 0: the multiple of kPanel at or before the first.
struct KeyRange {
  Interval keys;
  int32_t begin;
};

// BlockColumns of the blocks of a tile. Returns whether any block sees a key. The last block may be longer
// than the tile. The position after the tile does not count: it may see keys that no row of the tile sees,
// and whether these keys are visited at all depends on the tiles that run together.
JF_INLINE bool block_columns(const Head& head, const RowTile& tile, int32_t blocks, KeyRange range,
                             BlockColumns* columns) {
  const int32_t j0 = range.begin, i0 = tile.begin, heads = tile.heads;
  bool any = false;
  for (int32_t b = 0; b < blocks; ++b) {
    const int32_t first = i0 + b * kBlockRows / heads;
    const int32_t end = min(i0 + ((b + 1) * kBlockRows + heads - 1) / heads, tile.end);
    columns[b] = {};
    const SeenByRows seen = head.seen(QueryRange{first, end, heads}, range.keys);
    if (seen.any.empty()) continue;
    const RowSegments segments(head, first, end);
    const Interval by_segment = segments.trim(seen.any);
    const Columns all_used{by_segment.lo - j0, by_segment.hi - j0};
    const SeenPanels panels = seen_panels(head, {first, end, heads}, all_used, j0);
    const Columns used = panels.hull(all_used);
    if (by_segment.empty() || used.empty()) continue;
    const Interval keys{used.lo + j0, used.hi + j0};
    any = true;
    columns[b].used = used;
    columns[b].seen = panels.some;
    const bool anywhere = segments.differ_from(keys) || seen.holes;
    columns[b].mixed = anywhere ? kAllPanels : panels.mixed();
    const Interval all = intersect(seen.all, keys);
    columns[b].unmasked = {round_up(all.lo - j0, kPanel), round_down(all.hi - j0, kPanel)};
    const int32_t lo = columns[b].panels().lo;
    if (all.empty() || columns[b].unmasked.empty()) columns[b].unmasked = {lo, lo};
  }
  return any;
}

// Addresses of the tile's rows of query or its tangent, with a stride of `stride` elements between heads;
// null past the sequence's length.
JF_INLINE void query_addresses(const Head& head, const RowTile& tile, const Rows& query, int64_t stride,
                               const char** at) {
  const int64_t head_bytes = stride * size_of(head.problem.dtype);
  for (int32_t r = 0; r < tile.rows(); ++r) {
    const int32_t i = tile.position(r), h = tile.head_of(r) - head.head;
    at[r] = i < head.band.q_len ? query.at(i) + h * head_bytes : nullptr;
  }
}

// Masks the columns of [lo, hi) that lie outside `visible`. Returns the maximum of `lane_max` and these
// columns, lane by lane.
JF_INLINE Float hide_edges(Columns visible, int32_t lo, int32_t hi, float* s, Float lane_max) {
  const Columns inner{round_up(visible.lo, kLanes), round_down(visible.hi, kLanes)};
  for (int32_t c = lo; c < hi; c += kLanes) {
    Float x = load(s + c);
    if (c < inner.lo || c >= inner.hi) {
      const Int column = lane_indices() + c;
      x = (column >= visible.lo) & (column < visible.hi) ? x : broadcast(kNegInf);
      store(s + c, x);
    }
    lane_max = max(x, lane_max);
  }
  return lane_max;
}

// From this magnitude on the shift's rounding error would be visible in the exponent, so S − m is computed
// first.
inline constexpr float kLargeShift = 1 << 20;

// For each row of a tile, between the steps maximum and P: the shift of the exponent, and log2 of the factor
// that rescales l and O.
struct SoftmaxShift {
  float shift[kTileM];
  alignas(64) float change[kTileM + kLanes] = {};
};

// m ← max(m, max S) for one row of a block, and the resulting shift and rescale factor. `lane_max` is the
// maximum of the block's unmasked panels, lane by lane.
JF_INLINE void softmax_maximum(const Head& head, Row row, KeyRange range, const BlockColumns& block, float* s,
                               Float lane_max, Softmax& state, SoftmaxShift& shifts, int32_t r) {
  const int32_t j0 = range.begin;
  const Columns visible = head.seen_columns(row, j0, block.used), all = block.panels();
  const uint64_t unfinished = head.unfinished(block.mixed);
  if (head.has_options) lane_max = broadcast(kNegInf);
  for_each_run(all, block.seen & unfinished, [&](Columns run) {
    const Columns own = intersect(visible, run), whole = own.empty() ? Columns{run.hi, run.hi} : vectors(own);
    fill(s + run.lo, whole.lo - run.lo, kNegInf);
    fill(s + whole.hi, run.hi - whole.hi, kNegInf);
    if (own.empty()) return;
    lane_max = max(head.finish_scores(row, j0, own, block.mixed != 0, s, nullptr), lane_max);
  });
  for_each_run(all, block.seen & ~unfinished, [&](Columns run) {
    lane_max = hide_edges(visible, run.lo, min(run.hi, block.unmasked.lo), s, lane_max);
    lane_max = hide_edges(visible, max(run.lo, block.unmasked.hi), run.hi, s, lane_max);
  });
  const float scale_log2 = head.softmax_scale * kLog2e, highest = reduce_max(lane_max);
  const float m = highest > state.m[r] ? highest : state.m[r];
  shifts.shift[r] = m == kNegInf ? 0.0f : m * scale_log2;  // every key so far is masked
  shifts.change[r] = state.shift[r] - shifts.shift[r];
  state.shift[r] = m == kNegInf ? kNegInf : shifts.shift[r];
  if (__builtin_fabsf(shifts.shift[r]) >= kLargeShift) {
    shifts.change[r] = (state.m[r] - m) * scale_log2;
    shifts.shift[r] = 0.0f;
    for_each_run(all, block.seen, [&](Columns run) {
      for (int32_t c = run.lo; c < run.hi; c += kLanes) store(s + c, load(s + c) - m);
    });
  }
  state.m[r] = m;
}

// alpha of all rows.
template <class E>
JF_INLINE void softmax_rescale(int32_t rows, const SoftmaxShift& shifts, Softmax& state) {
  for (int32_t r = 0; r < rows; r += kLanes) {
    store(state.alpha + r, exp2_fast<E::kExpDegree>(load(shifts.change + r)));
  }
}

// P = exp(softmax_scale (S − m)) for one row of a block, l ← αl + ΣP. P replaces S, as words of E, multiplied
// by `weights` unless that is null: the scales of the columns' values.
template <class E>
JF_INLINE void softmax_row(const Head& head, Row row, int32_t j0, const BlockColumns& block, float* s,
                           float shift, Softmax& state, int32_t r, const float* weights = nullptr) {
  const Columns all = block.panels();
  const float scale_log2 = head.softmax_scale * kLog2e;
  Float sum = state.l[r] * state.alpha[r];
  Word* p = reinterpret_cast<Word*>(s);  // stored words of P never overwrite an S that is still to be read
  const auto exponentials = [&](int32_t c) {
    const Float x = exp2_fast<E::kExpDegree>(load(s + c) * scale_log2 - shift);
    sum += x;
    return x;
  };
  RowBuffer keep;
  if (head.has_dropout) head.dropout_row(row, j0, all, keep.value), weights = keep.value;
  for_each_run(all, block.seen, [&](Columns run) {
    if (weights) {
      for (int32_t c = run.lo; c < run.hi; c += kPanel) {
        const Float x = exponentials(c), y = exponentials(c + kLanes);
        E::store_columns(p, c, x * load(weights + c), y * load(weights + c + kLanes));
      }
      return;
    }
#pragma GCC unroll 2
    for (int32_t c = run.lo; c < run.hi; c += kPanel) {
      const Float x = exponentials(c);
      E::store_columns(p, c, x, exponentials(c + kLanes));
    }
  });
  state.l[r] = sum;
}

// The unnormalised output of a tile of rows over all or a part of its keys: O [rows, padded(dv)], and m and
// l of each row.
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

// out = O / l and lse = softmax_scale m + log l, with the row's sink in the sum; row_max = softmax_scale m,
// or NaN if a score is NaN. Rows past the sequence's length get out = 0, lse = row_max = -inf.
static void store_output(const Head& head, const RowTile& tile, const PartialOutput& from) {
  const Problem& p = head.problem;
  const Rows out = head.rows(p.out, p.value_dim, head.sequence.q_begin, tile.head);
  float* lse = head.row_statistic(p.lse) + (tile.head - head.head) * p.lse.head;
  float* maxima = nullptr;
  if (p.row_max) maxima = head.row_statistic(p.row_max) + (tile.head - head.head) * p.row_max.head;
  const float* sinks =
      p.sinks ? head.row_statistic(p.sinks) + (tile.head - head.head) * p.sinks.head : nullptr;
  for (int32_t r = 0; r < tile.rows(); ++r) {
    const int32_t i = tile.position(r), h = tile.head_of(r) - tile.head;
    float factor = 0.0f, statistic = kNegInf, largest = kNegInf;
    if (i < head.band.q_len) {
      float m = from.m[r] * head.softmax_scale, l = from.l[r], alpha = 1.0f;
      if (l != 0.0f) largest = l != l && m != -kNegInf ? l : m;
      if (sinks) {
        const SplitMerge merged = merge_splits(m, sinks[h * p.sinks.head + i * p.sinks.row], 1.0f);
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
    if (maxima) maxima[h * p.row_max.head + i * p.row_max.row] = largest;
  }
}

// first ← the output over the keys of both parts. Not inlined, so that every caller gets the same bits.
static __attribute__((noinline)) void merge_part(int32_t rows, int32_t width, float softmax_scale,
                                                 const PartialOutput& first, const PartialOutput& other) {
  const int32_t ld = padded(width);
  for (int32_t r = 0; r < rows; ++r) {
    const SplitMerge merged = merge_splits(first.m[r], other.m[r], softmax_scale);
    first.l[r] = first.l[r] * merged.first + other.l[r] * merged.second;
    first.m[r] = merged.m;
    float* o = first.o + r * ld;
    for (int32_t c = 0; c < ld; c += kLanes) {
      store(o + c, load(o + c) * merged.first + load(other.o + r * ld + c) * merged.second);
    }
  }
}

}  // namespace jax_flash::JF_ISA
