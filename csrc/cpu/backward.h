// Backward in one pass of five products (S, dP, dV, dK, dQ). A work item is a tile of keys at one query
// head: it accumulates dK and dV in scratch while it loops over the query tiles that see its keys. Tiles of
// keys add to dQ in ascending order, and query heads add to dK and dV in ascending order, so that the
// result does not depend on the threads.
#pragma once

#include "gradient.h"
#include "hidden.h"
#include "kernels.h"

namespace jax_flash::JF_ISA {

// Stores rows [begin, end) of a gradient: factor * x below `valid`, zeros from there on.
static void store_gradient(const Rows& rows, int32_t begin, int32_t end, int32_t valid, const float* x,
                           float factor) {
  alignas(64) static constexpr float kZeros[kMaxHeadDim] = {};
  const int32_t ld = padded(rows.width);
  for (int32_t i = begin; i < end; ++i) {
    store_row(rows.dtype, rows.at(i), rows.width, i < valid ? x + (i - begin) * ld : kZeros, factor);
  }
}

// A tile of keys, packed for all query tiles that it meets, with its accumulators and scratch.
struct KeyTile {
  int32_t begin, n, index;
  Word *k_panels, *v_panels;  // Kᵀ and Vᵀ as operand B of Q Kᵀ and dO Vᵀ
  Word* k_columns;            // K as operand B of dS K
  float *dk, *dv;             // [kGradientN, padded(d)], [kGradientN, padded(dv)]
  GradientTile gradient;
};

// From the first to the last row whose block uses some of columns [c, c + kBlockRows).
JF_INLINE Interval rows_that_use(const QueryTile& q, const UsedColumns* used, int32_t c) {
  int32_t lo = 0, hi = q.blocks;
  const auto unused = [&](int32_t b) {
    return !used[b].has_panel(c) && !used[b].has_panel(c + kBlockRows - 1);
  };
  while (lo < hi && unused(lo)) ++lo;
  while (lo < hi && unused(hi - 1)) --hi;
  return {q.begin + lo * kBlockRows, q.begin + hi * kBlockRows};
}

// dV += Pᵀ dO, dK += dSᵀ Q
template <class E>
static void add_to_keys(const Head& head, const QueryTile& q, const KeyTile& keys, const UsedColumns* used) {
  const Problem& p = head.problem;
  const int32_t step = E::kPair * kGradientRow;
  const int32_t blocks = round_up(keys.n, kBlockRows) / kBlockRows;
  Columns rows[kGradientN / kBlockRows];
  for (int32_t b = 0; b < blocks; ++b) {
    const int32_t j = keys.begin + b * kBlockRows;
    Interval seen = intersect(head.band.queries(j, j + kBlockRows), {q.begin, q.begin + q.count});
    if (head.is_sparse()) seen = intersect(seen, rows_that_use(q, used, b * kBlockRows));
    rows[b] = {(seen.lo - q.begin) / E::kPair, (seen.hi - q.begin + E::kPair - 1) / E::kPair};
    if (seen.empty()) rows[b] = {0, 0};
  }
  const auto add_product = [&](float* scores, const QueryRowsPack& x, float* sum, int32_t width) {
    for (int32_t c = 0; c < width; c += kPanel) {
      for (int32_t b = 0; b < blocks; ++b) {
        const auto [lo, hi] = rows[b];
        if (lo >= hi) continue;
        const int32_t j = b * kBlockRows;
        multiply_words<E, Start::kAccumulate, true>(as_words(scores) + j + lo * step, step,
                                                    x.columns + c / kPanel * x.panel + lo * x.row, hi - lo,
                                                    sum + j * width + c, width, {}, x.row);
      }
    }
  };
  add_product(keys.gradient.s, q.dout, keys.dv, padded(p.value_dim));
  add_product(keys.gradient.dp, q.q, keys.dk, padded(p.head_dim));
}

// dQ += dS K
template <class E>
static void add_to_queries(const Head& head, const QueryTile& q, const KeyTile& keys,
                           const UsedColumns* used) {
  const int32_t ld = padded(head.problem.head_dim), lda = E::kPair == 1 ? kGradientRow : kGradientRow / 2;
  const Word* ds = E::kPair == 1 ? as_words(keys.gradient.dp) : keys.gradient.ds_rows;
  const int32_t n = round_up(keys.n, kPanel) / E::kPair;
  for (int32_t c = 0; c < ld; c += kPanel) {
    for (int32_t b = 0; b < q.blocks; ++b) {
      const int32_t lo = used[b].lo / E::kPair, hi = min(used[b].hi / E::kPair, n);  // K has n words
      if (lo >= hi) continue;
      const int32_t r = b * kBlockRows;
      multiply_words<E, Start::kAccumulate, false>(
          ds + r * lda + lo, lda, keys.k_columns + c * n + lo * kPanel, hi - lo, q.dq + r * ld + c, ld, {});
    }
  }
}

// Loops over the query tiles in descending order. With a causal mask all tiles of keys then start at the
// same, last query tile, so each can follow the tile of keys before it at a distance of one query tile. The
// progress of a query tile is 1 once it is packed, and 2 + k once its k-th tile of keys has added to dQ. This
// count includes every tile of keys from the first to the last that the query tile sees, even those between
// in which it sees no key.
template <class E>
static void walk_queries(const Head& head, const KeyTile& keys, const SharedGradients& shared) {
  const Problem& p = head.problem;
  const Interval rows = head.band.queries(keys.begin, keys.begin + keys.n);
  if (rows.empty()) return;
  const Rows dquery = head.rows(p.dquery, p.head_dim, head.sequence.q_begin, head.head);
  const Progress& progress = shared.query_progress;
  for (int32_t tile = (rows.hi - 1) / kGradientM; tile >= rows.lo / kGradientM; --tile) {
    const int32_t i0 = tile * kGradientM, i1 = min(i0 + kGradientM, head.band.q_len);
    const Interval seen = head.seen_by_any({i0, i1}), turns = tiles_of(seen, kGradientN);
    if (!turns.contains(keys.index)) continue;
    const int32_t order = keys.index - turns.lo;
    const QueryTile q = query_tile<E>(head, i0, i1, shared.queries + tile * floats_of_query_tile<E>(p));
    if (order == 0) {
      pack_queries<E>(head, q, true);
      fill(q.dq, q.count * padded(p.head_dim), 0.0f);
      progress.signal(tile, 1);
    } else {
      progress.wait(tile, 1);
    }
    UsedColumns used[kGradientBlocks];
    const bool any = used_panels(head, q, keys.begin, keys.n, used);
    if (any) {
      tile_gradient<E>(head, q, keys.k_panels, keys.v_panels, keys.begin, keys.n, used, true, keys.gradient);
      add_to_keys<E>(head, q, keys, used);
    }
    progress.wait(tile, 1 + order);
    if (any) add_to_queries<E>(head, q, keys, used);
    if (keys.index + 1 == turns.hi) store_gradient(dquery, i0, i1, i1, q.dq, p.spec.scale);
    progress.signal(tile, 2 + order);
  }
}

// Zeros dQ of the rows that see no key and of those past the sequence's length.
static void zero_queries(const Head& head) {
  const Problem& p = head.problem;
  const Rows dquery = head.rows(p.dquery, p.head_dim, head.sequence.q_begin, head.head);
  const int32_t end = head.band.q_len;
  for (int32_t i = 0; i < end; i += kGradientM) {
    const int32_t i1 = min(i + kGradientM, end);
    if (head.seen_by_any({i, i1}).empty()) store_gradient(dquery, i, i1, i, nullptr, 1.0f);
  }
  if (!p.packed()) store_gradient(dquery, end, p.q_rows, end, nullptr, 1.0f);
}

static int64_t key_tile_floats(const Problem& p) {
  return int64_t{kGradientN} * (padded(p.head_dim) + padded(p.value_dim));
}

// Adds the dK and dV of the group's earlier query heads to this one's. Returns false if later heads of the
// group have not added theirs yet.
static bool sum_over_heads(const Head& head, const KeyTile& keys, const SharedGradients& shared) {
  const Problem& p = head.problem;
  const int32_t group = p.heads / p.kv_heads, g = head.head % group;
  if (group == 1) return true;
  const Progress& progress = shared.key_progress;
  progress.wait(keys.index, g);
  const auto add = [&](float* sum, float* own, int32_t count) {
    for (int32_t c = 0; c < count; c += kLanes) {
      const Float x = g == 0 ? load(own + c) : load(own + c) + load(sum + c);
      store(g + 1 < group ? sum + c : own + c, x);
    }
  };
  const int32_t ld = padded(p.head_dim), ldv = padded(p.value_dim);
  float* sum = shared.keys + keys.index * key_tile_floats(p);
  add(sum, keys.dk, keys.n * ld);
  add(sum + kGradientN * ld, keys.dv, keys.n * ldv);
  progress.signal(keys.index, g + 1);
  return g + 1 == group;
}

template <class E>
static KeyTile key_tile(const Head& head, const RowTile& tile, float* memory) {
  const Problem& p = head.problem;
  const int32_t ld = padded(p.head_dim), ldv = padded(p.value_dim);
  Scratch scratch{memory};
  KeyTile keys;
  keys.begin = tile.begin;
  keys.n = max(0, min(tile.end, head.band.k_len) - tile.begin);
  keys.index = tile.begin / kGradientN;
  keys.k_panels = as_words(scratch.take(kGradientN * ld));
  keys.v_panels = p.spec.shared_kv() ? keys.k_panels : as_words(scratch.take(kGradientN * ldv));
  keys.k_columns = as_words(scratch.take(kGradientN * ld));
  keys.dk = scratch.take(kGradientN * ld);
  keys.dv = scratch.take(kGradientN * ldv);
  keys.gradient.s = scratch.take(kGradientM * kGradientRow);
  keys.gradient.dp = scratch.take(kGradientM * kGradientRow);
  keys.gradient.ds_rows = as_words(scratch.take(kGradientM * kGradientRow / 2));
  fill(keys.dk, kGradientN * ld, 0.0f);
  fill(keys.dv, kGradientN * ldv, 0.0f);
  if (!head.seen_by_any({0, head.band.q_len}, {keys.begin, keys.begin + keys.n}).empty()) {
    pack_keys<E>(head, keys.begin, keys.n, keys.k_panels, keys.v_panels);
    const char* at[kGradientN] = {};
    head.key.addresses(keys.begin, keys.n, at);
    Rows key = head.key;
    key.missing = 0.0f;
    const int32_t n = round_up(keys.n, kPanel);
    pack_columns<E>(at, n, key, keys.k_columns);
    // Keys that are not finite are left out of dQ: in rows that see them, dS is NaN anyway.
    if (has_non_finite<E>(keys.k_columns, int64_t{n} / E::kPair * ld)) {
      NonFiniteKeys().find(1, [&](int32_t) { return key; }, keys.begin, keys.n, at);
      pack_columns<E>(at, n, key, keys.k_columns);
    }
  }
  return keys;
}

template <class E>
static void backward_as(const Problem& p, const RowTile& tile, const SharedGradients& shared, float* memory) {
  const Head head(p, tile.leading, tile.sequence, tile.head);
  const KeyTile keys = key_tile<E>(head, tile, memory);
  if (keys.index == 0) zero_queries(head);
  walk_queries<E>(head, keys, shared);
  if (!sum_over_heads(head, keys, shared)) return;
  const float factor = __builtin_fabsf(p.spec.scale);  // the packed queries carry the sign of the scale
  const auto store_keys = [&](const View& view, int32_t width, const float* x, float times) {
    const Rows rows = head.rows(view, width, tile.sequence.k_begin, p.kv_head(tile.head));
    store_gradient(rows, tile.begin, tile.end, head.band.k_len, x, times);
  };
  if (!p.spec.shared_kv()) {
    store_keys(p.dkey, p.head_dim, keys.dk, factor);
    store_keys(p.dvalue, p.value_dim, keys.dv, 1.0f);
    return;
  }
  // V is K: dK ← factor dK + dV, rounded once.
  for (int32_t c = 0; c < keys.n * padded(p.head_dim); c += kLanes) {
    store(keys.dv + c, load(keys.dk + c) * factor + load(keys.dv + c));
  }
  store_keys(p.dkey, p.head_dim, keys.dv, 1.0f);
}

static void backward(const Problem& p, const RowTile& tile, const SharedGradients& shared, float* memory) {
#if defined(__AVX512BF16__)
  if (uses_bf16_pairs(p)) return backward_as<BF16>(p, tile, shared, memory);
#endif
  backward_as<F32>(p, tile, shared, memory);
}

static int64_t query_tile_floats(const Problem& p) {
#if defined(__AVX512BF16__)
  if (uses_bf16_pairs(p)) return floats_of_query_tile<BF16>(p);
#endif
  return floats_of_query_tile<F32>(p);
}

}  // namespace jax_flash::JF_ISA
