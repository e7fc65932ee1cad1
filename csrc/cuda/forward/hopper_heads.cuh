// The forward for a few query tokens per sequence: all query heads of a KV head are rows of one tile, so that
// each key is read once for all of them (core/problem.h, HeadPacking).
#pragma once

#include <bit>
#include <cstdint>

#include "cuda/mask.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/score/alibi.cuh"
#include "cuda/score/draft.cuh"
#include "cuda/score/softcap.cuh"
#include "cuda/score/variant.cuh"
#include "cuda/tensor_map.h"
#include "cuda/work.cuh"

namespace jax_flash {

// The problem with packed heads as rows; q_rows and the schedule of packed sequences still count tokens. The
// band counts rows, so its limits are those of a whole tile, and PackedHeadsScore hides what each row does
// not see.
inline Problem pack_heads(const Problem& p) {
  const int32_t group = p.heads / p.kv_heads;
  Problem packed = p;
  packed.packing = {std::countr_zero(static_cast<uint32_t>(group)), p.spec.left, p.spec.right};
  packed.heads = p.kv_heads;
  packed.spec.left = packed.spec.right = kUnlimited;
  for (View* view : {&packed.query, &packed.out, &packed.lse, &packed.sinks, &packed.alibi_slopes})
    view->head *= group;
  return packed;
}

// A TMA box holds all query heads of a KV head for as many tokens as fill a tile of `rows` rows.
inline cudaError_t make_packed_query_map(CUtensorMap& map, const Problem& packed, int32_t columns,
                                         int32_t rows) {
  const int32_t group = 1 << packed.packing.shift;
  Problem by_entry = packed;  // the map's batch axis takes the KV heads, so the batch is made a leading axis
  by_entry.leading.rank = 1, by_entry.leading.size[0] = packed.packed() ? 1 : packed.batch;
  View query = packed.query;
  query.head = packed.query.head / group, query.batch = packed.query.head;
  query.leading[0] = packed.query.batch;
  MapShape shape{packed.head_dim, group, packed.q_rows, packed.kv_heads, columns, rows / group};
  shape.box_heads = group;
  return make_tensor_map(map, by_entry, query, shape);
}

// `row`: within the sequence.
__device__ __forceinline__ ptx::Coordinates packed_coordinates(const Problem& p, const BlockWork& work,
                                                               int32_t row) {
  return {0, 0, work.tile.q_begin + (row >> p.packing.shift), work.head, work.batch_row};
}

// A tile of tokens as a tile of their rows.
__device__ __forceinline__ void widen_to_heads(const Problem& p, TileWork& tile) {
  tile.row <<= p.packing.shift, tile.end <<= p.packing.shift, tile.q_len <<= p.packing.shift;
}

// The band of a tile whose rows are [row, end): it shows the keys up to those that the last token sees, and
// with a window those from the first token's on, and up to a tile's rows before them. Its shift becomes the
// diagonal of token 0.
__device__ __forceinline__ void limit_packed_band(const Problem& p, int32_t row, int32_t end, Band& band) {
  const int32_t shift = p.packing.shift;
  band.shift = first_draft(band.q_len >> shift, band.k_len);
  if (p.packing.left >= 0)
    band.left = band.diagonal(end - 1) - (band.diagonal(row >> shift) - p.packing.left);
  if (p.packing.right < 0) return;
  const int64_t last = band.diagonal((end - 1) >> shift) + p.packing.right;
  band.k_len = static_cast<int32_t>(max(int64_t{0}, min(int64_t{band.k_len}, last + 1)));
}

// The keys that all tokens of the rows [row, end) see.
__device__ __forceinline__ Interval common_of_packed(const Problem& p, const Band& band, int32_t row,
                                                     int32_t end) {
  const HeadPacking& heads = p.packing;
  const bool drafts = p.draft_mask && has_drafts(band.q_len >> heads.shift, p.draft_rows);
  int64_t lo = 0, hi = drafts ? min(band.shift, int64_t{band.k_len}) : band.k_len;
  if (heads.left >= 0) lo = max(lo, band.diagonal((end - 1) >> heads.shift) - heads.left);
  if (heads.right >= 0) hi = min(hi, band.diagonal(row >> heads.shift) + heads.right + 1);
  if (row >= end || hi <= lo) return {0, 0};
  return {static_cast<int32_t>(lo), static_cast<int32_t>(hi)};
}

// The offset of a packed row in o, lse, sinks or slopes.
struct PackedRows {
  int64_t token, head;
  int32_t shift;

  __device__ __forceinline__ PackedRows(const Problem& p, const View& view)
      : token(view.row), head(view.head >> p.packing.shift), shift(p.packing.shift) {}
  __device__ __forceinline__ int64_t operator()(int32_t row) const {
    const int32_t i = row >> shift;
    return i * token + (row - (i << shift)) * head;
  }
};

// The plain score. Causal and the draft mask hide new tokens, which are the last keys. kDrafts: whether the
// kernel takes draft masks.
template <class S, bool kDrafts>
struct PackedHeadsScore : PlainScore<S> {
  static constexpr bool kPositional = true;

  // S ← −inf where a row does not see the key.
  template <class Scores, class Tile>
  __device__ __forceinline__ static void hide_unseen(Scores& s, const Tile& tile) {
    const Problem& p = tile.p;
    const Band& band = tile.band();
    const int32_t tokens = band.q_len >> p.packing.shift, row = tile.row();
    const auto first = static_cast<int32_t>(band.shift);  // the new token 0
    const int32_t begin = first_of_window(p, first);
    const auto token = [&](int slot) { return (row + S::row(slot)) >> p.packing.shift; };
    const int32_t last = (row + S::kRows - 1) >> p.packing.shift;
    if (tile.key < begin + last)
      hide(s, tile.key, -INFINITY, [&](int slot) { return begin + token(slot); }, BeforeLimit{});
    if (tile.key + Scores::kColumns <= first) return;
    // Any number past the tokens is no limit.
    const int32_t end = first + (p.packing.right < 0 ? tokens : min(p.packing.right, tokens)) + 1;
    hide(s, tile.key, -INFINITY, [&](int slot) { return min(band.k_len, end + token(slot)); }, FromLimit{});
    if (!kDrafts || !p.draft_mask || !has_drafts(tokens, p.draft_rows)) return;
    const ElementMask drafts{p.draft_mask.template as<const uint8_t>() + tile.sequence() * p.draft_mask.batch,
                             p.draft_mask.row, first};
    hide_where<8>(
        s, band, tile.key, [row](int slot) { return row + S::row(slot); },
        [&](int, int32_t i, int32_t j) { return drafts.hides(i >> p.packing.shift, j); });
  }

 private:
  // The first key that token 0 sees; a large negative number if there is no window.
  __device__ __forceinline__ static int32_t first_of_window(const Problem& p, int32_t first) {
    constexpr int32_t kNone = -(1 << 30);
    return p.packing.left < 0 ? kNone : max(first, kNone + p.packing.left) - p.packing.left;
  }
};

// The same with a softcap, ALiBi or any scale.
template <class S>
struct PackedHeadsGeneralScore : PackedHeadsScore<S, true> {
  static constexpr bool kGeneral = true;
  template <class T, class M = float>
  using Softmax = OnlineSoftmax<S::kSlots>;

  template <class Softmax>
  __device__ __forceinline__ static float start(const Problem&) {
    return 1;
  }
  // S ← log2(e) · (softcap(scale · S) − slope · distance)
  template <class Scores, class Tile, class Softmax>
  __device__ __forceinline__ void apply(Scores& s, const Tile& tile, const Softmax& softmax) const {
    const Problem& p = tile.p;
    const AttentionSpec& spec = p.spec;
    if (spec.softcap > 0 && coarse_tanh(p)) {
      Softcap(spec).apply(s, 0, tile.band(), [&tile] { return tile.row(); }, tile.key);
    } else if (spec.softcap > 0) {
      cap(s, spec.softcap, spec.scale, NoGradient{});
    } else {
      const float scale = spec.scale * kLog2e;
      for_each(s, [scale](float& x, int, int, int) { x *= scale; });
    }
    if (p.alibi_slopes) {
      const int32_t first = static_cast<int32_t>(tile.band().shift) - tile.key - S::column(0);
      const float* const slopes =
          p.alibi_slopes.template as<const float>() + p.alibi_slopes.offset(tile.sequence(), tile.head(), 0);
      const PackedRows rows(p, p.alibi_slopes);
      subtract_distances(
          s, [&](int slot) { return slopes[rows(tile.row() + S::row(slot))] * kLog2e; },
          [&](int slot) {
            return static_cast<float>(first + ((tile.row() + S::row(slot)) >> p.packing.shift));
          },
          [](float x) { return x; });
    }
  }
};

}  // namespace jax_flash
