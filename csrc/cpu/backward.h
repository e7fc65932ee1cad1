// Backward, in two independent passes without atomics: dQ by tiles of queries, dK and dV by tiles of keys.
#pragma once

#include "gradient.h"
#include "kernels.h"

namespace jax_flash::JF_ISA {

// rows [begin, end) of a gradient: factor * x up to `valid`, zeros after it.
static void store_gradient(const Rows& rows, int32_t begin, int32_t end, int32_t valid, const float* x,
                           float factor) {
  alignas(64) static constexpr float kZeros[kMaxHeadDim] = {};
  const int32_t ld = padded(rows.width);
  for (int32_t i = begin; i < end; ++i) {
    store_row(rows.dtype, rows.at(i), rows.width, i < valid ? x + (i - begin) * ld : kZeros, factor);
  }
}

static void backward_query(const Problem& p, const RowTile& tile, float* memory) {
  const Head head(p, tile.leading, tile.sequence, tile.head);
  const int32_t ld = padded(p.head_dim), ldv = padded(p.value_dim);
  Scratch scratch{memory};
  QueryTile queries;
  queries.q = scratch.take(kTileM * ld);
  queries.dout = scratch.take(kTileM * ldv);
  float* dq = scratch.take(kTileM * ld);
  float* s = scratch.take(kTileM * kTileN);
  float* dp = scratch.take(kTileM * kTileN);
  float* rows = scratch.take(kTileN * (ld > ldv ? ld : ldv));
  float* k_panels = scratch.take(kTileN * ld);
  float* k_columns = scratch.take(kTileN * ld);
  float* v_panels = scratch.take(kTileN * ldv);

  load_queries(head, tile.begin, tile.end, queries);
  for (int32_t c = 0; c < queries.count * ld; c += kLanes) store(dq + c, Float{});
  const Interval visible = head.band.rows(tile.begin, tile.end);
  for (int32_t j0 = visible.lo; j0 < visible.hi; j0 += kTileN) {
    const int32_t n = min(visible.hi - j0, kTileN);
    Columns used[kMaxBlocks];
    if (!used_columns(head.band, tile.begin, queries.blocks, j0, n, used)) continue;
    load_rows(head.value, j0, j0 + n, n, 1.0f, rows);
    pack_transposed(rows, n, p.value_dim, v_panels);
    load_rows(head.key, j0, j0 + n, n, 1.0f, rows);
    pack_transposed(rows, n, p.head_dim, k_panels);
    pack_columns(rows, n, p.head_dim, k_columns);
    tile_gradient(head, queries, k_panels, v_panels, j0, n, used, 0, true, s, dp);
    multiply_values<Start::kAccumulate>(dp, k_columns, n, p.head_dim, used, queries.blocks, dq,
                                        nullptr);  // dQ += dS K
  }
  const Rows to = head.rows(p.dquery, p.head_dim, tile.sequence.q_begin, tile.head);
  store_gradient(to, tile.begin, tile.end, head.band.q_len, dq, p.spec.scale);
}

// The operands of backward_key that stay while it walks the queries.
struct KeyTile {
  int32_t begin, n;
  float *k_panels, *v_panels;  // transposed packs
  float *dk, *dv;              // [kTileN, padded]
  float *s, *dp, *columns;     // scratch
};

// Adds what one query head contributes: dV += Pᵀ dO, dK += dSᵀ Q.
static void accumulate_keys(const Head& head, QueryTile& queries, const KeyTile& keys) {
  const Problem& p = head.problem;
  const int32_t blocks = round_up(keys.n, kBlockRows) / kBlockRows;
  const Interval rows = head.band.queries(keys.begin, keys.begin + keys.n);
  for (int32_t i0 = rows.lo; i0 < rows.hi; i0 += kTileM) {
    load_queries(head, i0, rows.hi < i0 + kTileM ? rows.hi : i0 + kTileM, queries);
    const int32_t m = queries.count;
    Columns used[kMaxBlocks];
    if (!used_columns(head.band, i0, queries.blocks, keys.begin, keys.n, used)) continue;
    tile_gradient(head, queries, keys.k_panels, keys.v_panels, keys.begin, keys.n, used, blocks * kBlockRows,
                  true, keys.s, keys.dp);
    Columns used_rows[kTileN / kBlockRows];
    for (int32_t b = 0; b < blocks; ++b) {
      const int32_t j = keys.begin + b * kBlockRows;
      const Interval seen = intersect(head.band.queries(j, j + kBlockRows), {i0, i0 + m});
      used_rows[b] = {seen.lo - i0, seen.hi - i0};
    }
    pack_columns(queries.dout, m, p.value_dim, keys.columns);
    multiply_transposed(keys.s, keys.columns, m, p.value_dim, used_rows, blocks, keys.dv);
    pack_columns(queries.q, m, p.head_dim, keys.columns);
    multiply_transposed(keys.dp, keys.columns, m, p.head_dim, used_rows, blocks, keys.dk);
  }
}

static void backward_key(const Problem& p, const RowTile& tile, float* memory) {
  const int32_t ld = padded(p.head_dim), ldv = padded(p.value_dim), group = p.heads / p.kv_heads;
  const Head first(p, tile.leading, tile.sequence, tile.head * group);
  Scratch scratch{memory};
  QueryTile queries;
  queries.q = scratch.take(kTileM * ld);
  queries.dout = scratch.take(kTileM * ldv);
  KeyTile keys;
  keys.begin = tile.begin;
  keys.n = min(tile.end, first.band.k_len) - tile.begin;
  keys.k_panels = scratch.take(kTileN * ld);
  keys.v_panels = scratch.take(kTileN * ldv);
  keys.dk = scratch.take(kTileN * ld);
  keys.dv = scratch.take(kTileN * ldv);
  keys.s = scratch.take(kTileM * kTileN);
  keys.dp = scratch.take(kTileM * kTileN);
  keys.columns = scratch.take(kTileM * (ld > ldv ? ld : ldv));
  for (int32_t c = 0; c < kTileN * ld; c += kLanes) store(keys.dk + c, Float{});
  for (int32_t c = 0; c < kTileN * ldv; c += kLanes) store(keys.dv + c, Float{});

  if (!first.band.queries(tile.begin, tile.end).empty()) {
    float* rows = scratch.take(kTileN * (ld > ldv ? ld : ldv));
    load_rows(first.key, tile.begin, tile.begin + keys.n, keys.n, 1.0f, rows);
    pack_transposed(rows, keys.n, p.head_dim, keys.k_panels);
    load_rows(first.value, tile.begin, tile.begin + keys.n, keys.n, 1.0f, rows);
    pack_transposed(rows, keys.n, p.value_dim, keys.v_panels);
    for (int32_t g = 0; g < group; ++g) {
      accumulate_keys(Head(p, tile.leading, tile.sequence, tile.head * group + g), queries, keys);
    }
  }
  const float factor = __builtin_fabsf(p.spec.scale);  // the queries carry its sign
  const Rows dkey = first.rows(p.dkey, p.head_dim, tile.sequence.k_begin, tile.head);
  const Rows dvalue = first.rows(p.dvalue, p.value_dim, tile.sequence.k_begin, tile.head);
  store_gradient(dkey, tile.begin, tile.end, first.band.k_len, keys.dk, factor);
  store_gradient(dvalue, tile.begin, tile.end, first.band.k_len, keys.dv, 1.0f);
}

}  // namespace jax_flash::JF_ISA
