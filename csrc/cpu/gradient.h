// Recomputes P and dS of one tile from lse, the first step of backward and bias_gradient.
#pragma once

#include "dropout.h"
#include "product.h"
#include "segments.h"

namespace jax_flash::JF_ISA {

// Query rows and keys of a tile of the backward. Products read P and dS column by column, so the row stride
// kGradientRow is no power of two: rows then fall into different cache sets.
inline constexpr int kGradientM = 16 * kBlockRows;
inline constexpr int kGradientN = kBlockRows == 8 ? 128 : 144;
inline constexpr int kGradientRow = kGradientN + 16;
inline constexpr int kGradientBlocks = kGradientM / kBlockRows;

JF_INLINE Word* as_words(float* x) { return reinterpret_cast<Word*>(x); }

// Packed rows of Q or dO. `rows` is operand A, [count, row_words(width)] with row stride `ld`. `columns` is
// operand B of products that sum over the rows: column c of row k is at columns[c / kPanel * panel + k /
// kPair * row].
struct QueryRowsPack {
  Word *rows, *columns;
  int32_t ld;
  int64_t panel, row;
};

// A tile of queries as the backward reads it, packed once for all tiles of keys.
struct QueryTile {
  int32_t begin, count, blocks;  // count: rows, rounded up to a multiple of kBlockRows
  QueryRowsPack q, dout;         // q is multiplied by query_sign
  float *lse, *delta;            // [count]; lse is +inf for rows without a visible key, so that P = 0
  float* dq;                     // [count, padded(d)]
};

// The stride of packed query rows. In float32 one copy serves as `rows` and as `columns`; products then read
// it column by column, so the stride must be no power of two.
template <class E>
JF_INLINE int32_t query_row(int32_t width) {
  return row_words<E>(width) + (E::kPair == 1 ? kLanes : 0);
}

// The size of a QueryTile's memory, in floats.
template <class E>
JF_INLINE int64_t floats_of_query_tile(const Problem& p) {
  return int64_t{kGradientM} *
         (E::kPair * (query_row<E>(p.head_dim) + query_row<E>(p.value_dim)) + padded(p.head_dim) + 2);
}

template <class E>
JF_INLINE QueryRowsPack query_rows(int32_t width, int32_t count, Scratch& scratch) {
  const int32_t ld = query_row<E>(width);
  Word* rows = as_words(scratch.take(kGradientM * ld));
  if constexpr (E::kPair == 1) return {rows, rows, ld, kPanel, ld};
  return {rows, as_words(scratch.take(kGradientM * ld)), ld, int64_t{count} / E::kPair * kPanel, kPanel};
}

template <class E>
JF_INLINE QueryTile query_tile(const Head& head, int32_t begin, int32_t end, float* memory) {
  end = min(end, head.band.q_len);
  Scratch scratch{memory};
  QueryTile tile;
  tile.begin = begin;
  tile.count = round_up(end > begin ? end - begin : 0, kBlockRows);
  tile.blocks = tile.count / kBlockRows;
  tile.q = query_rows<E>(head.problem.head_dim, tile.count, scratch);
  tile.dout = query_rows<E>(head.problem.value_dim, tile.count, scratch);
  tile.lse = scratch.take(kGradientM);
  tile.delta = scratch.take(kGradientM);
  tile.dq = scratch.next;
  return tile;
}

template <class E>
static void pack_queries(const Head& head, const QueryTile& tile, bool columns) {
  const Problem& p = head.problem;
  const float *lse = head.row_statistic(p.lse), *delta = head.row_statistic(p.delta);
  Rows query = head.query;
  const Rows dout = head.dout();
  query.factor = head.query_sign;
  const char *q_at[kGradientM] = {}, *dout_at[kGradientM] = {};
  for (int32_t r = 0; r < tile.count; ++r) {
    const int32_t i = tile.begin + r;
    const float x = i < head.band.q_len ? lse[i * p.lse.row] : kNegInf;
    // A row without a visible key contributes nothing, whatever its q and dO hold (NaN included).
    const bool sees = x != kNegInf;
    tile.lse[r] = sees ? x : -kNegInf;
    tile.delta[r] = sees ? delta[i * p.delta.row] : 0.0f;
    q_at[r] = sees ? query.at(i) : nullptr;
    dout_at[r] = sees ? dout.at(i) : nullptr;
  }
  pack_rows<E>(q_at, tile.count, tile.count, query, 1.0f, tile.q.rows, tile.q.ld);
  pack_rows<E>(dout_at, tile.count, tile.count, dout, 1.0f, tile.dout.rows, tile.dout.ld);
  if (!columns || E::kPair == 1) return;
  pack_columns<E>(q_at, tile.count, query, tile.q.columns);
  pack_columns<E>(dout_at, tile.count, dout, tile.dout.columns);
}

// Packs Kᵀ and Vᵀ of keys [j0, j0 + n) as operand B; if V is K, only once.
template <class E>
static void pack_keys(const Head& head, int32_t j0, int32_t n, Word* k_panels, Word* v_panels) {
  const char* at[kGradientN] = {};
  head.key.addresses(j0, n, at);
  pack_transposed<E>(at, n, head.key, k_panels, panel_words<E>(head.key.width));
  if (v_panels == k_panels) return;
  head.value.addresses(j0, n, at);
  pack_transposed<E>(at, n, head.value, v_panels, panel_words<E>(head.value.width));
}

// The inputs that turn one row of S and dP into P and dS.
struct GradientRow {
  Columns visible;
  float lse, delta;
  const float *slopes, *keep;  // derivative of the softcap and dropout factors, or null
};

struct Gradient {
  Float p, ds;  // p: after dropout, as dV needs it
};

// P = exp(softmax_scale S − lse), clamped to 1, because the exponent may be positive if |lse| is so large
// that its rounding error exceeds the difference of scores. The product is rounded as it was for lse, so that
// the only key of a row has P = 1.
template <int kDegree>
JF_INLINE Float probability(Float s, float softmax_scale, float lse) {
  const Float exponent = (rounded(s * softmax_scale) - lse) * kLog2e;
  return exp2_fast<kDegree>(exponent > 0.0f ? Float{} : exponent);
}

template <int kDegree, bool kMasked, bool kGeneral>
JF_INLINE Gradient gradient(const GradientRow& row, float softmax_scale, int32_t c, Float s, Float dp) {
  Gradient g;
  g.p = probability<kDegree>(s, softmax_scale, row.lse);
  const Float p = g.p;
  if constexpr (kGeneral) {
    if (row.keep) {
      const Float keep = load(row.keep + c);
      g.p = p * keep;
      dp = keep > Float{} ? dp * keep : Float{};  // dP of a dropped element may be infinite
    }
  }
  g.ds = p * (dp - row.delta);
  if constexpr (kGeneral) {
    if (row.slopes) g.ds = g.ds * load(row.slopes + c);
  }
  if constexpr (kMasked) {
    const Int column = lane_indices() + c;
    const auto inside = (column >= row.visible.lo) & (column < row.visible.hi);
    g.p = inside ? g.p : Float{};
    g.ds = inside ? g.ds : Float{};
  }
  if constexpr (kGeneral) {  // lse and dP of a hidden score may be NaN
    g.p = s == kNegInf ? Float{} : g.p;
    g.ds = s == kNegInf ? Float{} : g.ds;
  }
  return g;
}

// Where P and dS of a tile are stored. In float32 they replace S and dP. In bf16, the words of row r (r
// even) hold P (or dS) of rows r and r + 1, which is operand A of Pᵀ dO and dSᵀ Q, and ds_rows holds dS row
// by row, operand A of dS K.
struct GradientTile {
  float *s, *dp;  // [kGradientM, kGradientRow]
  Word* ds_rows;  // [kGradientM, kGradientRow / 2], bf16 only
};

template <int kPair, bool kMasked, bool kGeneral>
static void store_gradient_rows(const GradientRow* rows, float softmax_scale, int32_t r, Columns used,
                                const GradientTile& t) {
  float *s = t.s + r * kGradientRow, *dp = t.dp + r * kGradientRow;
  if constexpr (kPair == 1) {
    for (int32_t c = used.lo; c < used.hi; c += kLanes) {
      const Gradient g = gradient<5, kMasked, kGeneral>(rows[0], softmax_scale, c, load(s + c), load(dp + c));
      store(s + c, g.p);
      store(dp + c, g.ds);
    }
  } else {
#if defined(__AVX512BF16__)
    static constexpr uint16_t kInterleave[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                 21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i interleave = _mm512_loadu_si512(kInterleave);
    uint16_t* ds0 = reinterpret_cast<uint16_t*>(t.ds_rows + r * (kGradientRow / 2));
    uint16_t* ds1 = reinterpret_cast<uint16_t*>(t.ds_rows + (r + 1) * (kGradientRow / 2));
    for (int32_t c = used.lo; c < used.hi; c += kLanes) {
      const Gradient a = gradient<4, kMasked, kGeneral>(rows[0], softmax_scale, c, load(s + c), load(dp + c));
      const Gradient b = gradient<4, kMasked, kGeneral>(rows[1], softmax_scale, c, load(s + kGradientRow + c),
                                                        load(dp + kGradientRow + c));
      const __m512i p = (__m512i)_mm512_cvtne2ps_pbh((__m512)b.p, (__m512)a.p);
      const __m512i ds = (__m512i)_mm512_cvtne2ps_pbh((__m512)b.ds, (__m512)a.ds);
      _mm512_store_si512(s + c, _mm512_permutexvar_epi16(interleave, p));
      _mm512_store_si512(dp + c, _mm512_permutexvar_epi16(interleave, ds));
      _mm256_store_si256(reinterpret_cast<__m256i*>(ds0 + c), _mm512_castsi512_si256(ds));
      _mm256_store_si256(reinterpret_cast<__m256i*>(ds1 + c), _mm512_extracti64x4_epi64(ds, 1));
    }
#endif
  }
}

// The columns that products use for a block of rows. `seen` is the smallest interval that holds all columns
// that some row may see, `panels` are the panels with such columns, and `mixed` those of them in which
// segments, masks or holes may hide columns.
struct UsedColumns : Columns {
  Columns seen{0, 0};
  uint64_t panels = kAllPanels, mixed = 0;

  JF_HD bool has_panel(int32_t c) const { return lo <= c && c < hi && (panels >> (c / kPanel) & 1) != 0; }
};

// Finds the columns that each block of rows may see, widened to whole panels and blocks of keys, as the
// products read P and dS. Returns whether any block sees a key.
JF_INLINE bool used_panels(const Head& head, const QueryTile& q, int32_t j0, int32_t n, UsedColumns* used) {
  bool any = false;
  const Interval keys = RowSegments(head, q.begin, q.begin + q.count).trim({j0, j0 + n});
  for (int32_t b = 0; b < q.blocks; ++b) {
    const int32_t i = q.begin + b * kBlockRows, end = i + kBlockRows;
    used[b] = {};
    const SeenByRows by_rows = head.seen(QueryRange{i, end}, keys);
    if (by_rows.any.empty()) continue;
    const RowSegments segments(head, i, end);
    const Interval by_segment = segments.trim(by_rows.any);
    const Columns all{by_segment.lo - j0, by_segment.hi - j0};
    const SeenPanels panels = seen_panels(head, {i, end}, all, j0);
    const Columns c = panels.hull(all);
    if (by_segment.empty() || c.empty()) continue;
    used[b] = {
        {round_down(round_down(c.lo, kBlockRows), kPanel), round_up(round_up(c.hi, kBlockRows), kPanel)},
        c,
        panels.some,
        segments.differ_from({j0 + c.lo, j0 + c.hi}) || by_rows.holes ? kAllPanels : panels.mixed()};
    any = true;
  }
  return any;
}

template <int kPair>
static void compute_gradient_rows(const Head& head, const QueryTile& q, int32_t j0, bool through_softcap,
                                  int32_t r, UsedColumns used, const GradientTile& t) {
  GradientRow rows[kPair];
  RowBuffer slopes[kPair], keep[kPair];
  const bool capped = through_softcap && head.problem.spec.softcap > 0;
  const uint64_t unfinished = head.unfinished(used.mixed);
  bool masked = false;
  for (int32_t k = 0; k < kPair; ++k) {
    const Row row{q.begin + r + k, head.head};
    const Columns visible = head.seen_columns(row, j0, used.seen);
    masked |= visible.lo > used.lo || visible.hi < used.hi;
    rows[k] = {visible, q.lse[r + k], q.delta[r + k], nullptr, nullptr};
    if (visible.hi <= visible.lo) continue;
    for_each_run(used, used.panels & unfinished, [&](Columns run) {
      const Columns own = intersect(run, visible);
      if (own.empty()) return;
      head.finish_scores(row, j0, own, used.mixed != 0, t.s + (r + k) * kGradientRow,
                         capped ? slopes[k].value : nullptr);
    });
    if (capped) rows[k].slopes = slopes[k].value;
    if (head.has_dropout) {
      head.dropout_row(row, j0, visible, keep[k].value);
      rows[k].keep = keep[k].value;
    }
  }
  const uint64_t general = head.has_dropout ? kAllPanels : unfinished;
  for_each_run(used, used.panels & general, [&](Columns run) {
    if (masked) return store_gradient_rows<kPair, true, true>(rows, head.softmax_scale, r, run, t);
    return store_gradient_rows<kPair, false, true>(rows, head.softmax_scale, r, run, t);
  });
  for_each_run(used, used.panels & ~general, [&](Columns run) {
    if (masked) return store_gradient_rows<kPair, true, false>(rows, head.softmax_scale, r, run, t);
    return store_gradient_rows<kPair, false, false>(rows, head.softmax_scale, r, run, t);
  });
}

// P ← 0 and dS ← 0 in the columns of row r that its block does not use. Products over keys read the panels
// between used ones. If is_sparse(), blocks before and after this one may see a key that it does not see, and
// products over rows then read this block too.
template <int kPair>
static void clear_unused(int32_t n, int32_t r, const UsedColumns& used, const GradientTile& t) {
  const int32_t end = round_up(round_up(n, kBlockRows), kPanel);
  for (int32_t c = 0; c < end; c += kPanel) {
    if (used.has_panel(c)) continue;
    fill(t.s + r * kGradientRow + c, kPanel, 0.0f);
    fill(t.dp + r * kGradientRow + c, kPanel, 0.0f);
    for (int32_t k = 0; kPair > 1 && k < kPair; ++k) {
      __builtin_memset(t.ds_rows + (r + k) * (kGradientRow / 2) + c / 2, 0, kPanel / 2 * sizeof(Word));
    }
  }
}

// S = Q Kᵀ and dP = dO Vᵀ over the visible panels, then P and dS row by row.
template <class E, int kPair = E::kPair>
static void tile_gradient(const Head& head, const QueryTile& q, const Word* k_panels, const Word* v_panels,
                          int32_t j0, int32_t n, const UsedColumns* used, bool through_softcap,
                          const GradientTile& t) {
  const Problem& p = head.problem;
  const int32_t ld = row_words<E>(p.head_dim), ldv = row_words<E>(p.value_dim);
  const int32_t d = depth_words<E>(p.head_dim), dv = depth_words<E>(p.value_dim);
  for (int32_t j = 0; j < n; j += kPanel) {
    for (int32_t b = 0; b < q.blocks; ++b) {
      if (!used[b].has_panel(j)) continue;
      const int32_t r = b * kBlockRows;
      multiply_words<E, Start::kZero, false>(q.q.rows + r * q.q.ld, q.q.ld, k_panels + j * ld, d,
                                             t.s + r * kGradientRow + j, kGradientRow, {});
    }
    for (int32_t b = 0; b < q.blocks; ++b) {
      if (!used[b].has_panel(j)) continue;
      const int32_t r = b * kBlockRows;
      multiply_words<E, Start::kZero, false>(q.dout.rows + r * q.dout.ld, q.dout.ld, v_panels + j * ldv, dv,
                                             t.dp + r * kGradientRow + j, kGradientRow, {});
    }
  }
  for (int32_t r = 0; r < q.count; r += kPair) {
    const UsedColumns& block = used[r / kBlockRows];
    if (!block.empty()) compute_gradient_rows<kPair>(head, q, j0, through_softcap, r, block, t);
    if (head.is_sparse()) clear_unused<kPair>(n, r, block, t);
  }
}

}  // namespace jax_flash::JF_ISA
