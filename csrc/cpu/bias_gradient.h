// dbias: dS summed over what the bias is broadcast over. Each tile of dbias is one item, so nothing is
// shared.
#pragma once

#include "gradient.h"
#include "kernels.h"

namespace jax_flash::JF_ISA {

// Scratch of one item, and its sum [kTileM, kTileN].
struct BiasScratch {
  QueryTile queries;
  float *s, *dp, *rows, *k_panels, *v_panels, *sum;
};

// sum[r or 0, c or 0] += dS[r, c] over the columns that each block of rows uses.
static void add_tile(const BiasScratch& t, const Columns* used, bool one_row, bool one_column) {
  for (int32_t r = 0; r < t.queries.count; ++r) {
    const Columns block = used[r / kBlockRows];
    const float* ds = t.dp + r * kTileN;
    float* sum = t.sum + (one_row ? 0 : r * kTileN);
    if (one_column) {
      float total = 0.0f;
      for (int32_t c = block.lo; c < block.hi; ++c) total += ds[c];
      sum[0] += total;
    } else {
      for (int32_t c = block.lo; c < block.hi; ++c) sum[c] += ds[c];
    }
  }
}

// Adds the dS of one head over rows [i0, i1) and keys [j0, j1).
static void add_head(const Head& head, Interval rows, Interval columns, BiasScratch& t) {
  const Problem& p = head.problem;
  const bool one_row = p.dbias_rows == 1, one_column = p.dbias_columns == 1;
  for (int32_t i0 = rows.lo; i0 < rows.hi; i0 += kTileM) {
    const int32_t i1 = min(rows.hi, i0 + kTileM);
    const Interval hull = intersect(head.band.rows(i0, i1), columns);
    if (hull.empty()) continue;
    load_queries(head, i0, i1, t.queries);
    for (int32_t j0 = columns.lo; j0 < hull.hi; j0 += kTileN) {
      const int32_t n = min(hull.hi - j0, kTileN);
      Columns used[kMaxBlocks];
      if (!used_columns(head.band, i0, t.queries.blocks, j0, n, used)) continue;
      load_rows(head.key, j0, j0 + n, n, 1.0f, t.rows);
      pack_transposed(t.rows, n, p.head_dim, t.k_panels);
      load_rows(head.value, j0, j0 + n, n, 1.0f, t.rows);
      pack_transposed(t.rows, n, p.value_dim, t.v_panels);
      tile_gradient(head, t.queries, t.k_panels, t.v_panels, j0, n, used, 0, false, t.s, t.dp);
      add_tile(t, used, one_row, one_column);
    }
  }
}

static void bias_gradient(const Problem& p, const BiasTile& tile, float* memory) {
  const int32_t ld = padded(p.head_dim), ldv = padded(p.value_dim);
  Scratch scratch{memory};
  BiasScratch t;
  t.queries.q = scratch.take(kTileM * ld);
  t.queries.dout = scratch.take(kTileM * ldv);
  t.s = scratch.take(kTileM * kTileN);
  t.dp = scratch.take(kTileM * kTileN);
  t.sum = scratch.take(kTileM * kTileN);
  t.rows = scratch.take(kTileN * (ld > ldv ? ld : ldv));
  t.k_panels = scratch.take(kTileN * ld);
  t.v_panels = scratch.take(kTileN * ldv);
  const int32_t height = tile.row_end - tile.row_begin, width = tile.column_end - tile.column_begin;
  for (int32_t c = 0; c < height * kTileN; c += kLanes) store(t.sum + c, Float{});

  const bool all_batch = p.dbias_batch == 1, all_heads = p.dbias_heads == 1;
  const Interval rows = p.dbias_rows == 1 ? Interval{0, p.q_rows} : Interval{tile.row_begin, tile.row_end};
  const Interval columns =
      p.dbias_columns == 1 ? Interval{0, p.k_rows} : Interval{tile.column_begin, tile.column_end};
  for (int32_t b = all_batch ? 0 : tile.batch; b < (all_batch ? p.batch : tile.batch + 1); ++b) {
    const Sequence sequence = fixed_sequence(p, tile.leading, b);
    for (int32_t h = all_heads ? 0 : tile.head; h < (all_heads ? p.heads : tile.head + 1); ++h) {
      add_head(Head(p, tile.leading, sequence, h), rows, columns, t);
    }
  }
  const View& to = p.dbias;
  const int64_t start = to.leading_offset(p.leading, tile.leading);
  for (int32_t r = 0; r < height; ++r) {
    const int64_t offset = start + to.offset(tile.batch, tile.head, tile.row_begin + r, tile.column_begin);
    store_row(p.bias_dtype, to.as<char>() + offset * size_of(p.bias_dtype), width, t.sum + r * kTileN, 1.0f);
  }
}

}  // namespace jax_flash::JF_ISA
