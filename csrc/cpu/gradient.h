// P and dS of one tile, recomputed from lse: what every backward kernel starts from.
#pragma once

#include "head.h"
#include "matmul.h"
#include "softmax.h"

namespace jax_flash::JF_ISA {

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

// A tile of queries as the backward needs it.
struct QueryTile {
  int32_t begin, count, blocks;  // count: rows rounded up to whole blocks
  float* q;                      // [count, padded(d)], times query_sign
  float* dout;                   // [count, padded(dv)]
  float lse[kTileM];             // +inf where P = 0
  float delta[kTileM];
};

JF_INLINE void load_queries(const Head& head, int32_t begin, int32_t end, QueryTile& tile) {
  end = min(end, head.band.q_len);
  tile.begin = begin;
  tile.count = round_up(end > begin ? end - begin : 0, kBlockRows);
  tile.blocks = tile.count / kBlockRows;
  load_rows(head.query, begin, end, tile.count, head.query_sign, tile.q);
  load_rows(head.dout(), begin, end, tile.count, 1.0f, tile.dout);
  const Problem& p = head.problem;
  const float *lse = head.row_statistic(p.lse), *delta = head.row_statistic(p.delta);
  for (int32_t r = 0; r < tile.count; ++r) {
    const int32_t i = begin + r;
    const float x = i < end ? lse[i * p.lse.row] : kNegInf;
    tile.lse[r] = x == kNegInf ? -kNegInf : x;
    tile.delta[r] = x == kNegInf ? 0.0f : delta[i * p.delta.row];
    if (x == kNegInf) {  // a row that sees nothing gives nothing, whatever it and its cotangent hold
      clear(tile.q + r * padded(p.head_dim), 0, padded(p.head_dim));
      clear(tile.dout + r * padded(p.value_dim), 0, padded(p.value_dim));
    }
  }
}

// One row: S, dP -> dropped P, dS in place. `through_softcap` multiplies dS by the softcap's slope.
// Zeros the rest of [used.lo, used.hi) in both.
static void gradient_row(const Head& head, int32_t i, int32_t j0, int32_t n, Columns used, float lse,
                         float delta, bool through_softcap, float* s, float* dp) {
  const Columns visible = visible_columns(head.band, i, {j0, j0 + n}, j0);
  Columns whole = vectors(visible);
  if (visible.hi <= visible.lo) whole = {used.hi, used.hi};
  clear(s, used.lo, whole.lo);
  clear(dp, used.lo, whole.lo);
  clear(s, whole.hi, used.hi);
  clear(dp, whole.hi, used.hi);
  if (visible.hi <= visible.lo) return;

  RowBuffer slopes, keep;
  const bool capped = through_softcap && head.problem.spec.softcap > 0;
  final_scores(head, {i, head.head}, j0, visible, s, capped ? slopes.value : nullptr);
  if (head.drops) {
    for (int32_t c = whole.lo; c < whole.hi; c += kLanes) store(keep.value + c, Float{});
    head.dropout_row({i, head.head}, j0, visible, keep.value);
  }
  for (int32_t c = whole.lo; c < whole.hi; c += kLanes) {
    const Float p = exp2((load(s + c) * head.unit - lse) * kLog2e);
    Float dropped = p, dprob = load(dp + c);
    if (head.drops) {
      const Float k = load(keep.value + c);
      dropped = p * k;
      dprob = dprob * k;
    }
    Float ds = p * (dprob - delta);
    if (capped) ds = ds * load(slopes.value + c);
    store(s + c, dropped);
    store(dp + c, ds);
  }
}

// S = Q Kᵀ and dP = dO Vᵀ of the used blocks, then P and dS row by row. `clear_to`: columns that every row
// must define, or 0 for those that its block uses.
static void tile_gradient(const Head& head, const QueryTile& tile, const float* k_panels,
                          const float* v_panels, int32_t j0, int32_t n, const Columns* used, int32_t clear_to,
                          bool through_softcap, float* s, float* dp) {
  multiply_scores(tile.q, k_panels, head.problem.head_dim, used, tile.blocks, n, s);
  multiply_scores(tile.dout, v_panels, head.problem.value_dim, used, tile.blocks, n, dp);
  for (int32_t r = 0; r < tile.count; ++r) {
    const Columns block = clear_to ? Columns{0, clear_to} : used[r / kBlockRows];
    if (block.lo >= block.hi) continue;
    gradient_row(head, tile.begin + r, j0, n, block, tile.lse[r], tile.delta[r], through_softcap,
                 s + r * kTileN, dp + r * kTileN);
  }
}

}  // namespace jax_flash::JF_ISA
