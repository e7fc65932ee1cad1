// dbias: dS summed over what the bias is broadcast over. Each tile of dbias is one item, so nothing is
// shared.
#pragma once

#include "gradient.h"
#include "kernels.h"

namespace jax_flash::JF_ISA {

// Scratch of one item, and its sum [kGradientM, kGradientN].
struct BiasScratch {
  QueryTile queries;
  float* memory;  // of the queries
  GradientTile gradient;
  Word *k_panels, *v_panels;
  float* sum;
};

// sum[r or 0, c or 0] += dS[r, c] over the columns that each block of rows uses.
static void add_tile(const BiasScratch& t, const Columns* used, bool one_row, bool one_column) {
  for (int32_t r = 0; r < t.queries.count; ++r) {
    const Columns block = used[r / kBlockRows];
    const float* ds = t.gradient.dp + r * kGradientRow;
    float* sum = t.sum + (one_row ? 0 : r * kGradientN);
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
template <class E>
static void add_head(const Head& head, Interval rows, Interval columns, BiasScratch& t) {
  const Problem& p = head.problem;
  const bool one_row = p.dbias_rows == 1, one_column = p.dbias_columns == 1;
  for (int32_t i0 = rows.lo; i0 < rows.hi; i0 += kGradientM) {
    const int32_t i1 = min(rows.hi, i0 + kGradientM);
    const Interval hull = intersect(head.band.rows(i0, i1), columns);
    if (hull.empty()) continue;
    t.queries = query_tile<E>(head, i0, i1, t.memory);
    pack_queries<E>(head, t.queries, false);
    for (int32_t j0 = columns.lo; j0 < hull.hi; j0 += kGradientN) {
      const int32_t n = min(hull.hi - j0, kGradientN);
      Columns used[kGradientBlocks];
      if (!used_panels(head.band, t.queries, j0, n, used)) continue;
      pack_keys<E>(head, j0, n, t.k_panels, t.v_panels);
      tile_gradient<E, 1>(head, t.queries, t.k_panels, t.v_panels, j0, n, used, false, t.gradient);
      add_tile(t, used, one_row, one_column);
    }
  }
}

template <class E>
static void bias_gradient_as(const Problem& p, const BiasTile& tile, float* memory) {
  const int32_t ld = padded(p.head_dim), ldv = padded(p.value_dim);
  Scratch scratch{memory};
  BiasScratch t;
  t.memory = scratch.take(floats_of_query_tile<E>(p));
  t.gradient.s = scratch.take(kGradientM * kGradientRow);
  t.gradient.dp = scratch.take(kGradientM * kGradientRow);
  t.k_panels = as_words(scratch.take(kGradientN * ld));
  t.v_panels = as_words(scratch.take(kGradientN * ldv));
  t.sum = scratch.take(kGradientM * kGradientN);
  const int32_t height = tile.row_end - tile.row_begin, width = tile.column_end - tile.column_begin;
  for (int32_t c = 0; c < height * kGradientN; c += kLanes) store(t.sum + c, Float{});

  const bool all_batch = p.dbias_batch == 1, all_heads = p.dbias_heads == 1;
  const Interval rows = p.dbias_rows == 1 ? Interval{0, p.q_rows} : Interval{tile.row_begin, tile.row_end};
  const Interval columns =
      p.dbias_columns == 1 ? Interval{0, p.k_rows} : Interval{tile.column_begin, tile.column_end};
  for (int32_t b = all_batch ? 0 : tile.batch; b < (all_batch ? p.batch : tile.batch + 1); ++b) {
    const Sequence sequence = fixed_sequence(p, tile.leading, b);
    for (int32_t h = all_heads ? 0 : tile.head; h < (all_heads ? p.heads : tile.head + 1); ++h) {
      add_head<E>(Head(p, tile.leading, sequence, h), rows, columns, t);
    }
  }
  const View& to = p.dbias;
  const int64_t start = to.leading_offset(p.leading, tile.leading);
  for (int32_t r = 0; r < height; ++r) {
    const int64_t offset = start + to.offset(tile.batch, tile.head, tile.row_begin + r, tile.column_begin);
    store_row(p.bias_dtype, to.as<char>() + offset * size_of(p.bias_dtype), width, t.sum + r * kGradientN,
              1.0f);
  }
}

static void bias_gradient(const Problem& p, const BiasTile& tile, float* memory) {
#if defined(__AVX512BF16__)
  if (p.dtype == DType::kBF16) return bias_gradient_as<BF16>(p, tile, memory);
#endif
  bias_gradient_as<F32>(p, tile, memory);
}

}  // namespace jax_flash::JF_ISA
