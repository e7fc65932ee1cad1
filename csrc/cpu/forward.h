// Forward of one tile of queries: online softmax over tiles of the visible keys.
#pragma once

#include "head.h"
#include "kernels.h"

namespace jax_flash::JF_ISA {

// The softmax of a tile of rows: m the maximum of S, l = Σ exp(unit (S − m)), alpha the last rescale.
struct SoftmaxState {
  float m[kTileM], l[kTileM];
  alignas(64) float alpha[kTileM];
};

// The columns of tile [j0, j0 + n) that each block of rows uses, and whether any does.
JF_INLINE bool used_columns(const Band& band, int32_t i0, int32_t blocks, int32_t j0, int32_t n,
                            Columns* used) {
  bool any = false;
  for (int32_t b = 0; b < blocks; ++b) {
    const int32_t i = i0 + b * kBlockRows;
    const Interval keys = intersect(band.rows(i, i + kBlockRows), {j0, j0 + n});
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
JF_INLINE void final_scores(const Head& head, int32_t i, int32_t j0, Columns visible, float* s,
                            float* slopes) {
  if (head.extra) head.finish_scores(i, j0, visible, s, slopes);
  const Columns whole = vectors(visible);
  for (int32_t c = whole.lo; c < visible.lo; ++c) s[c] = kNegInf;
  for (int32_t c = visible.hi; c < whole.hi; ++c) s[c] = kNegInf;
}

JF_INLINE void clear(float* row, int32_t lo, int32_t hi) {
  for (int32_t c = lo; c < hi; ++c) row[c] = 0.0f;
}

// S -> P in place for one row: m ← max(m, S), P = exp(unit (S − m)), l ← αl + ΣP. Zeros the rest of [used.lo,
// used.hi).
static void softmax_row(const Head& head, int32_t i, int32_t j0, int32_t n, Columns used, float* s,
                        SoftmaxState& state, int32_t r) {
  const Columns visible = visible_columns(head.band, i, j0, n), whole = vectors(visible);
  state.alpha[r] = 1.0f;
  if (visible.hi <= visible.lo) return clear(s, used.lo, used.hi);
  clear(s, used.lo, whole.lo);
  clear(s, whole.hi, used.hi);
  final_scores(head, i, j0, visible, s, nullptr);

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
    head.dropout_row(i, j0, visible, keep.value);
    for (int32_t c = visible.lo; c < visible.hi; ++c) s[c] *= keep.value[c];
  }
}

// out = O / l and lse = unit m + log l, the sink joining the sum; rows past the length are filled.
static void store_output(const Head& head, const RowTile& tile, const float* o, const SoftmaxState& state) {
  const Problem& p = head.problem;
  const Rows out = head.rows(p.out, p.value_dim, head.sequence.q_begin, head.head);
  float* lse = head.row_statistic(p.lse);
  const View& sinks = p.sinks;
  const float sink =
      sinks ? sinks.as<const float>()[sinks.leading_offset(p.leading, head.leading) + head.head * sinks.head]
            : kNegInf;
  for (int32_t i = tile.begin; i < tile.end; ++i) {
    const int32_t r = i - tile.begin;
    float factor = 0.0f, statistic = kNegInf;
    if (i < head.band.q_len) {
      float m = state.m[r] * head.unit, l = state.l[r], alpha = 1.0f;
      if (sinks) {
        const float top = sink > m ? sink : m, zero = top == kNegInf ? 0.0f : top;
        const Float powers = exp2(broadcast((m - zero) * kLog2e)),
                    sink_powers = exp2(broadcast((sink - zero) * kLog2e));
        alpha = powers[0];
        l = l * alpha + sink_powers[0];
        m = top;
      }
      if (l != 0.0f) {
        factor = alpha / l;
        statistic = m + logf(l);
      }
    }
    const float* row = o + r * padded(p.value_dim);
    store_row(out.dtype, out.at(i), out.width, row, factor);
    lse[i * p.lse.row] = statistic;
  }
}

static void forward(const Problem& p, const RowTile& tile, float* memory) {
  const Head head(p, tile.leading, tile.sequence, tile.head);
  const int32_t rows = tile.end - tile.begin, count = round_up(rows, kBlockRows), blocks = count / kBlockRows;
  const int32_t ld = padded(p.head_dim), ldv = padded(p.value_dim);
  Scratch scratch{memory};
  float* q = scratch.take(kTileM * ld);
  float* s = scratch.take(kTileM * kTileN);
  float* o = scratch.take(kTileM * ldv);
  float* keys = scratch.take(kTileN * (ld > ldv ? ld : ldv));
  float* k_panels = scratch.take(kTileN * ld);
  float* v_panels = scratch.take(kTileN * ldv);

  load_rows(head.query, tile.begin, min(tile.end, head.band.q_len), count, head.query_sign, q);
  SoftmaxState state;
  for (int32_t r = 0; r < count; ++r) state.m[r] = kNegInf, state.l[r] = 0.0f;
  for (int32_t c = 0; c < count * ldv; c += kLanes) store(o + c, Float{});

  const Interval visible = head.band.rows(tile.begin, tile.end);
  for (int32_t j0 = visible.lo; j0 < visible.hi; j0 += kTileN) {
    const int32_t n = min(visible.hi - j0, kTileN);
    Columns used[kMaxBlocks];
    if (!used_columns(head.band, tile.begin, blocks, j0, n, used)) continue;
    load_rows(head.key, j0, j0 + n, n, 1.0f, keys);
    pack_transposed(keys, n, p.head_dim, k_panels);
    multiply_scores(q, k_panels, p.head_dim, used, blocks, n, s);  // S = Q Kᵀ
    for (int32_t r = 0; r < count; ++r) {
      const Columns block = used[r / kBlockRows];
      if (block.lo < block.hi) softmax_row(head, tile.begin + r, j0, n, block, s + r * kTileN, state, r);
    }
    load_rows(head.value, j0, j0 + n, n, 1.0f, keys);
    pack_columns(keys, n, p.value_dim, v_panels);
    multiply_values<Start::kRescale>(s, v_panels, n, p.value_dim, used, blocks, o,
                                     state.alpha);  // O ← αO + P V
  }
  store_output(head, tile, o, state);
}

}  // namespace jax_flash::JF_ISA
