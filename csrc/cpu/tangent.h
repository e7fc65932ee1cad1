// Tangents of query tiles: one pass over the visible keys that recomputes P from lse. Three of its five
// products compute S and its tangent dS, the other two the tangent of the output.
#pragma once

#include "forward.h"
#include "gradient.h"

namespace jax_flash::JF_ISA {

// A tile has fewer keys than in the forward, because K, tK, V and tV stay packed. The row stride of S and dS,
// kTangentRow, is no power of two, so that rows fall into different cache sets.
inline constexpr int32_t kTangentN = 256, kTangentRow = kTangentN + kLanes;

// Scratch, in floats: packed K, tK, V and tV, S and dS, and for every query tile Q, tQ, tO and r.
constexpr int64_t tangent_floats(int64_t d, int64_t dv, int64_t tiles) {
  return 2 * kTangentN * (d + dv) + 2 * kTileM * kTangentRow + tiles * kTileM * (2 * d + dv + kLanes);
}
inline constexpr int64_t kTangentFloats = 3 << 19;  // upper bound, so that scratch stays in the cache
static_assert(kTangentFloats <= kScratchFloats);
static_assert(tangent_floats(kMaxHeadDim, kMaxHeadDim, 8) <= kTangentFloats);

// The number of query tiles that run together and share each packed tile of keys.
static int32_t tangent_tiles(const Problem& p) {
  int32_t tiles = kMaxQueryTiles;
  while (tangent_floats(padded(p.head_dim), padded(p.value_dim), tiles) > kTangentFloats) --tiles;
  return tiles;
}

// A packed tile of keys. Each panel of `k` holds Kᵀ and, `half` words later, tKᵀ, so that tQ Kᵀ + Q tKᵀ is
// one product of twice the depth.
struct TangentKeys {
  KeyRange range;
  Word *k, *v, *tv;
  NonFiniteKeys non_finite, non_finite_tv;  // keys whose v or tv is not finite

  JF_HD int32_t size() const { return range.keys.hi - range.begin; }
};

// A tile of queries during its loop over the keys. Each row of `q` holds tQ, then Q. `sum` [count,
// padded(dv)] is the tangent of the output before r · out is subtracted; `r` is Σ P∘dS, lane by lane.
struct TangentTile {
  const RowTile* tile;
  RowSegments segments;
  Interval keys;  // keys of the current tile that segments, ranges and masks let the rows see
  int32_t rows, blocks;
  Word* q;
  float* sum;
  Float* r;
};

// The inputs that turn one row of S and T = tQ Kᵀ + Q tKᵀ into P and P∘dS.
struct TangentRow {
  Columns visible;
  float lse;
  float scale;  // of T
  // The derivative of the softcap, the tangent of the bias, dropout factors, or null.
  const float *slopes, *tbias, *keep;
  bool bias_first;
};

// Replaces S by D∘P and T by D∘P∘dS in these panels, as words of E; D has the dropout factors. Returns Σ
// P∘dS, lane by lane.
template <class E, bool kMasked, bool kGeneral>
JF_INLINE Float tangent_columns(const TangentRow& row, float softmax_scale, Columns panels, float* s,
                                float* t) {
  Float sum{};
  struct Pair {
    Float p, w;
  };
  const auto column = [&](int32_t c) {
    const Float x = load(s + c);
    Float p = probability<E::kExpDegree>(x, softmax_scale, row.lse), ds = load(t + c) * row.scale;
    if constexpr (kGeneral) {
      if (row.tbias && row.bias_first) ds = ds + load(row.tbias + c);
      if (row.slopes) ds = ds * load(row.slopes + c);
      if (row.tbias && !row.bias_first) ds = ds + load(row.tbias + c);
    }
    Float w = p * ds;
    // A hidden key contributes nothing, whatever its dS is.
    if constexpr (kGeneral) w = x == kNegInf ? Float{} : w;
    if constexpr (kMasked) {
      const Int at = lane_indices() + c;
      const auto inside = (at >= row.visible.lo) & (at < row.visible.hi);
      p = inside ? p : Float{};
      w = inside ? w : Float{};
    }
    sum += w;
    if constexpr (kGeneral) {
      if (row.keep) {
        const Float keep = load(row.keep + c);
        p = p * keep;
        w = w * keep;
      }
    }
    return Pair{p, w};
  };
  for (int32_t c = panels.lo; c < panels.hi; c += kPanel) {
    const Pair a = column(c), b = column(c + kLanes);
    E::store_columns(as_words(s), c, a.p, b.p);
    E::store_columns(as_words(t), c, a.w, b.w);
  }
  return sum;
}

// Computes the tangents of the tiles of one KV head together, so that every tile of keys is packed once.
template <class E>
class TangentLoop {
 public:
  TangentLoop(const Problem& p, const Tangents& t, const RowTile* tiles, int32_t count, float* memory)
      : problem_(p),
        tangents_(t),
        head_(p, tiles[0].leading, tiles[0].sequence, tiles[0].head),
        count_(count),
        half_(row_words<E>(p.head_dim)) {
    Scratch scratch{memory};
    keys_.k = as_words(scratch.take(kTangentN * 2 * half_));
    keys_.v = as_words(scratch.take(kTangentN * row_words<E>(p.value_dim)));
    keys_.tv = as_words(scratch.take(kTangentN * row_words<E>(p.value_dim)));
    s_ = scratch.take(kTileM * kTangentRow);
    t_ = scratch.take(kTileM * kTangentRow);
    for (int32_t i = 0; i < count; ++i) tiles_[i] = rows_of(tiles[i], scratch);
  }

  void run() {
    attend_once(false);
    bool nan = false;
    for (int32_t i = 0; i < count_; ++i)
      nan |= has_nan(tiles_[i].sum, tiles_[i].rows * padded(problem_.value_dim));
    if (nan) attend_once(true);
    for (int32_t i = 0; i < count_; ++i) store_results(tiles_[i]);
  }

 private:
  // Computes the sums of all tiles. separate_non_finite: keys that are not finite are added one by one
  // (hidden.h).
  void attend_once(bool separate_non_finite) {
    keys_.non_finite.count = keys_.non_finite_tv.count = 0;
    for (int32_t i = 0; i < count_; ++i) {
      const TangentTile& x = tiles_[i];
      fill(x.sum, x.blocks * kBlockRows * padded(problem_.value_dim), 0.0f);
      fill(reinterpret_cast<float*>(x.r), x.rows * kLanes, 0.0f);
    }
    const RowTile &first = *tiles_[0].tile, &last = *tiles_[count_ - 1].tile;
    const Interval keys =
        head_.seen_by_any({min(first.begin, last.begin), max(first.end, last.end), first.heads});
    // Tiles of keys begin at multiples of kTangentN, so that results do not depend on the run of query tiles.
    for (int32_t j0 = round_down(keys.lo, kTangentN); j0 < keys.hi; j0 += kTangentN) {
      const Interval tile = trim_to_seen(head_, tiles_, count_, intersect(keys, {j0, j0 + kTangentN}));
      if (tile.empty()) continue;
      pack(tile, separate_non_finite);
      for (int32_t i = 0; i < count_; ++i) attend(tiles_[i]);
    }
  }

  TangentTile rows_of(const RowTile& tile, Scratch& scratch) const {
    const Problem& p = problem_;
    TangentTile x;
    x.tile = &tile;
    x.segments = RowSegments(head_, tile.begin, tile.end);
    x.rows = tile.rows();
    x.blocks = round_up(x.rows, kBlockRows) / kBlockRows;
    x.q = as_words(scratch.take(kTileM * 2 * half_));
    x.sum = scratch.take(kTileM * padded(p.value_dim));
    x.r = reinterpret_cast<Float*>(scratch.take(kTileM * kLanes));
    const Rows tquery = head_.rows(tangents_.tquery, p.head_dim, head_.sequence.q_begin, head_.head);
    const char* at[kTileM] = {};
    const auto pack_half = [&](const Rows& rows, const View& view, Word* to) {
      query_addresses(head_, tile, rows, view.head, at);
      pack_rows<E>(at, x.rows, x.blocks * kBlockRows, rows, head_.query_sign, to, 2 * half_);
    };
    pack_half(tquery, tangents_.tquery, x.q);
    pack_half(head_.query, p.query, x.q + half_);
    return x;
  }

  void pack(Interval keys, bool separate_non_finite) {
    keys_.range = {keys, round_down(keys.lo, kPanel)};
    const int32_t begin = keys_.range.begin, n = keys_.size(), h = problem_.kv_head(head_.head);
    const auto rows = [&](const View& view, int32_t width) {
      return head_.rows(view, width, head_.sequence.k_begin, h);
    };
    const char* at[kTangentN];
    const auto pack_half = [&](const Rows& x, Word* to) {
      x.addresses(begin, n, at);
      pack_transposed<E>(at, n, x, to, 2 * half_ * kPanel);
    };
    pack_half(head_.key, keys_.k);
    pack_half(rows(tangents_.tkey, problem_.head_dim), keys_.k + half_ * kPanel);
    const auto pack_values = [&](const Rows& x, NonFiniteKeys& non_finite, Word* to) {
      x.addresses(begin, n, at);
      if (separate_non_finite) non_finite.find(1, [&](int32_t) { return x; }, begin, n, at);
      pack_columns<E>(at, n, x, to);
    };
    pack_values(head_.value, keys_.non_finite, keys_.v);
    pack_values(tvalue(), keys_.non_finite_tv, keys_.tv);
  }

  // Adds the current tile of keys to a tile of queries.
  void attend(const TangentTile& x) {
    BlockColumns columns[kMaxBlocks];
    const KeyRange range{x.keys, keys_.range.begin};
    if (!block_columns(head_, *x.tile, x.blocks, range, columns)) return;
    const int32_t depth = depth_words<E>(problem_.head_dim), dv = problem_.value_dim;
    const int64_t row = 2 * half_, panel = row * kPanel;
    BlockPanels panels[kMaxBlocks];
    BlockPanels::of_blocks(columns, x.blocks, panels);
    for (int32_t j = 0; j < keys_.size(); j += kPanel) {
      // S = Q Kᵀ, T = tQ Kᵀ + Q tKᵀ
      multiply_score_panel<E>({x.q + half_, row, keys_.k, panel, depth}, j / kPanel, x.blocks, panels, s_,
                              kTangentRow, nullptr);
      multiply_score_panel<E>({x.q, row, keys_.k, panel, half_ + depth}, j / kPanel, x.blocks, panels, t_,
                              kTangentRow, nullptr);
    }
    for (int32_t r = 0; r < x.rows; ++r) {
      const BlockColumns& block = columns[r / kBlockRows];
      if (!block.used.empty()) x.r[r] += probabilities(x, r, block);
    }
    // tO ← tO + (D∘P) tV + (D∘P∘dS) V
    multiply_values<E, Start::kAccumulate>({s_, kTangentRow, keys_.tv, keys_.size()}, x.blocks, columns, dv,
                                           x.sum, nullptr);
    multiply_values<E, Start::kAccumulate>({t_, kTangentRow, keys_.v, keys_.size()}, x.blocks, columns, dv,
                                           x.sum, nullptr);
    const auto add_non_finite = [&](const NonFiniteKeys& non_finite, const Rows& values,
                                    const float* weights) {
      add_non_finite_keys<E>(
          head_, non_finite, keys_.range.begin, x.rows,
          [&](int32_t r) { return Row{x.tile->position(r), x.tile->head_of(r)}; },
          [&](int32_t) { return values; }, weights, kTangentRow, x.sum, padded(dv));
    };
    add_non_finite(keys_.non_finite_tv, tvalue(), s_);
    add_non_finite(keys_.non_finite, head_.value, t_);
  }

  Rows tvalue() const {
    return head_.rows(tangents_.tvalue, problem_.value_dim, head_.sequence.k_begin,
                      problem_.kv_head(head_.head));
  }

  // S and T of row r become D∘P and D∘P∘dS. Returns Σ P∘dS.
  Float probabilities(const TangentTile& x, int32_t r, const BlockColumns& block) {
    const Problem& p = problem_;
    const Columns panels = block.panels();
    const Row row{x.tile->position(r), x.tile->head_of(r)};
    const int32_t j0 = keys_.range.begin;
    float *s = s_ + r * kTangentRow, *t = t_ + r * kTangentRow;
    RowBuffer slopes, tbias, keep;
    TangentRow own{head_.seen_columns(row, j0, block.used),
                   lse_of(row),
                   __builtin_fabsf(p.spec.scale),
                   nullptr,
                   nullptr,
                   nullptr,
                   p.spec.bias_first};
    if (own.lse == kNegInf) own.visible = {0, 0};  // mask, bias or segments hide every key
    const bool masked = own.visible.lo > panels.lo || own.visible.hi < panels.hi;
    const bool general = !own.visible.empty() && (head_.unfinished(block.mixed) != 0 || head_.has_dropout);
    const auto sum = [&] {
      Float total{};
      for_each_run(panels, block.seen, [&](Columns run) {
        total += masked    ? general ? tangent_columns<E, true, true>(own, head_.softmax_scale, run, s, t)
                                     : tangent_columns<E, true, false>(own, head_.softmax_scale, run, s, t)
                 : general ? tangent_columns<E, false, true>(own, head_.softmax_scale, run, s, t)
                           : tangent_columns<E, false, false>(own, head_.softmax_scale, run, s, t);
      });
      return total;
    };
    if (!general) return sum();
    if (head_.unfinished(block.mixed) != 0) {
      const bool capped = p.spec.softcap > 0;
      head_.finish_scores(row, j0, own.visible, block.mixed != 0, s, capped ? slopes.value : nullptr);
      if (capped) own.slopes = slopes.value;
    }
    if (tangents_.tbias) {
      head_.bias_tangent_row(tangents_.tbias, row, j0, own.visible, tbias.value);
      own.tbias = tbias.value;
    }
    if (head_.has_dropout) {
      head_.dropout_row(row, j0, panels, keep.value);
      own.keep = keep.value;
    }
    return sum();
  }

  // lse of a row; −inf past the sequence's length.
  float lse_of(Row row) const {
    if (row.position >= head_.band.q_len) return kNegInf;
    const View& lse = problem_.lse;
    return head_.row_statistic(lse)[(row.head - head_.head) * lse.head + row.position * lse.row];
  }

  // tout = tO − r out and tlse = r; 0 for rows without a visible key and past the sequence's length.
  void store_results(const TangentTile& x) const {
    const Problem& p = problem_;
    const auto rows = [&](const View& view) {
      return head_.rows(view, p.value_dim, head_.sequence.q_begin, head_.head);
    };
    const Rows out = rows(p.out), tout = rows(tangents_.tout);
    const View& tlse = tangents_.tlse;
    const int32_t ld = padded(p.value_dim);
    alignas(64) static constexpr float kZeros[kMaxHeadDim] = {};
    alignas(64) float r_out[kMaxHeadDim];
    // Rows are far apart: the hardware prefetcher does not follow them.
    const auto prefetch = [&](int32_t i) {
      const int32_t position = x.tile->position(i), h = x.tile->head_of(i) - head_.head;
      const int64_t size = size_of(out.dtype);
      const char* from = out.at(position) + h * p.out.head * size;
      char* to = tout.at(position) + h * tangents_.tout.head * size;
      for (int64_t b = 0; b < p.value_dim * size; b += kLineBytes) {
        __builtin_prefetch(from + b);
        __builtin_prefetch(to + b, 1);
      }
    };
    constexpr int32_t kAhead = 4;  // rows
    for (int32_t i = 0; i < min(kAhead, x.rows); ++i) prefetch(i);
    for (int32_t i = 0; i < x.rows; ++i) {
      if (i + kAhead < x.rows) prefetch(i + kAhead);
      const Row row{x.tile->position(i), x.tile->head_of(i)};
      const int32_t h = row.head - head_.head;
      const bool sees = lse_of(row) != kNegInf;
      const float r = sees ? reduce_sum(x.r[i]) : 0.0f;
      float* sum = x.sum + i * ld;
      if (sees) {
        load_row(out.dtype, out.at(row.position) + h * p.out.head * size_of(out.dtype), p.value_dim, r, r_out,
                 ld);
        for (int32_t c = 0; c < ld; c += kLanes) store(sum + c, load(sum + c) - load(r_out + c));
      }
      store_row(tout.dtype, tout.at(row.position) + h * tangents_.tout.head * size_of(tout.dtype),
                p.value_dim, sees ? sum : kZeros, 1.0f);
      head_.row_statistic(tlse)[h * tlse.head + row.position * tlse.row] = r;
    }
  }

  const Problem& problem_;
  const Tangents& tangents_;
  Head head_;
  int32_t count_, half_;  // half_: words of a packed row of Q
  TangentKeys keys_;
  float *s_, *t_;
  TangentTile tiles_[kMaxQueryTiles];
};

static void tangent(const Problem& p, const Tangents& t, const RowTile* tiles, int32_t count, float* memory) {
#if defined(__AVX512BF16__)
  if (uses_bf16_pairs(p)) return TangentLoop<BF16>(p, t, tiles, count, memory).run();
#endif
  TangentLoop<F32>(p, t, tiles, count, memory).run();
}

}  // namespace jax_flash::JF_ISA
