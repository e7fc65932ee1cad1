// dbias: dS summed over the axes along which the bias is broadcast. Each tile of dbias is one work item, so
// that items share nothing.
#pragma once

#include "gradient.h"
#include "kernels.h"

namespace jax_flash::JF_ISA {

// Scratch of one work item and its accumulator, sum [rows, kGradientN].
struct BiasScratch {
  QueryTile queries;
  float* memory;  // backs `queries`
  GradientTile gradient;
  Word *k_panels, *v_panels;
  float* sum;
};

// sum[r or 0, c or 0] += dS[r, c] over the columns that each block of rows sees; the index is 0 if dbias has
// only one row, or one column.
static void add_tile(const BiasScratch& t, const UsedColumns* used, bool one_row, bool one_column,
                     float* sum) {
  for (int32_t r = 0; r < t.queries.count; ++r) {
    const Columns block = used[r / kBlockRows];
    const float* ds = t.gradient.dp + r * kGradientRow;
    float* row = sum + (one_row ? 0 : r * kGradientN);
    Float total{};
    for (int32_t c = block.lo; c < block.hi; c += kLanes) {
      if (one_column) {
        total += load(ds + c);
      } else {
        store(row + c, load(row + c) + load(ds + c));
      }
    }
    if (one_column) row[0] += reduce_sum(total);
  }
}

// Adds dS of one head over these rows and columns.
template <class E>
static void add_head(const Head& head, Interval rows, Interval columns, BiasScratch& t) {
  const Problem& p = head.problem;
  const bool one_row = p.dbias_rows == 1, one_column = p.dbias_columns == 1;
  for (int32_t j0 = columns.lo; j0 < columns.hi; j0 += kGradientN) {
    const int32_t n = min(min(columns.hi, head.band.k_len) - j0, kGradientN);
    const Interval seen = intersect(head.band.queries(j0, j0 + n), rows);
    if (seen.empty()) continue;
    pack_keys<E>(head, j0, n, t.k_panels, t.v_panels);
    for (int32_t i0 = seen.lo - (seen.lo - rows.lo) % kGradientM; i0 < seen.hi; i0 += kGradientM) {
      t.queries = query_tile<E>(head, i0, min(rows.hi, i0 + kGradientM), t.memory);
      UsedColumns used[kGradientBlocks];
      if (!used_panels(head, t.queries, j0, n, used)) continue;
      pack_queries<E>(head, t.queries, false);
      tile_gradient<E, 1>(head, t.queries, t.k_panels, t.v_panels, j0, n, used, p.spec.bias_first,
                          t.gradient);
      add_tile(t, used, one_row, one_column, t.sum + (one_row ? 0 : (i0 - rows.lo) * kGradientN));
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
  t.v_panels = p.spec.shared_kv() ? t.k_panels : as_words(scratch.take(kGradientN * ldv));
  const int32_t height = tile.row_end - tile.row_begin, width = tile.column_end - tile.column_begin;
  t.sum = scratch.take(round_up(height, kGradientM) * kGradientN);
  fill(t.sum, height * kGradientN, 0.0f);

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
  if (uses_bf16_pairs(p)) return bias_gradient_as<BF16>(p, tile, memory);
#endif
  bias_gradient_as<F32>(p, tile, memory);
}

}  // namespace jax_flash::JF_ISA
