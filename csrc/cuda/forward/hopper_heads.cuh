// The forward for a few query tokens per sequence: all query heads of a KV head are rows of one tile, so that
// each key is read once for all of them (core/problem.h, HeadPacking).
#pragma once

#include <bit>
#include <cstdint>

#include "cuda/ptx/tma.cuh"
#include "cuda/score/draft.cuh"
#include "cuda/score/variant.cuh"
#include "cuda/tensor_map.h"
#include "cuda/work.cuh"

namespace jax_flash {

// The problem with packed heads as rows. Its band hides nothing; PackedHeadsScore applies the causal and the
// draft mask, because these count tokens and not rows.
inline Problem pack_heads(const Problem& p) {
  const int32_t group = p.heads / p.kv_heads;
  Problem packed = p;
  packed.packing = {std::countr_zero(static_cast<uint32_t>(group)), p.q_rows, p.spec.right};
  packed.heads = p.kv_heads, packed.q_rows = p.q_rows * group, packed.spec.right = kUnlimited;
  for (View* view : {&packed.query, &packed.out, &packed.lse}) view->head *= group;
  return packed;
}

// A TMA box holds all query heads of a KV head for as many tokens as fill a tile of `rows` rows.
inline cudaError_t make_packed_query_map(CUtensorMap& map, const Problem& packed, int32_t columns,
                                         int32_t rows) {
  const int32_t group = 1 << packed.packing.shift;
  Problem by_entry = packed;  // the map's batch axis takes the KV heads, so the batch is made a leading axis
  by_entry.leading.rank = 1, by_entry.leading.size[0] = packed.batch;
  View query = packed.query;
  query.head = packed.query.head / group, query.batch = packed.query.head;
  query.leading[0] = packed.query.batch;
  MapShape shape{packed.head_dim, group, packed.packing.tokens, packed.kv_heads, columns, rows / group};
  shape.box_heads = group;
  return make_tensor_map(map, by_entry, query, shape);
}

__device__ __forceinline__ ptx::Coordinates packed_coordinates(const Problem& p, const BlockWork& work,
                                                               int32_t row) {
  return {0, 0, row >> p.packing.shift, work.head, work.batch_row};
}

// The offset of a packed row in o or lse.
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

// The plain score. The causal and the draft mask apply to the new tokens only, which are the last keys.
template <class S>
struct PackedHeadsScore : PlainScore<S> {
  static constexpr bool kPositional = true;

  template <class Scores, class Tile, class Softmax>
  __device__ __forceinline__ void apply(Scores& s, const Tile& tile, const Softmax&) const {
    const Problem& p = tile.p;
    const Band& band = tile.band();
    const int32_t first = first_draft(p.packing.tokens, band.k_len);
    if (tile.key + Scores::kColumns <= first || (p.packing.right < 0 && !p.draft_mask)) return;
    ElementMask drafts;
    if (p.draft_mask)
      drafts = {p.draft_mask.template as<const uint8_t>() + tile.sequence() * p.draft_mask.batch,
                p.draft_mask.row, first};
    // The number of keys that a token sees to the right of its own; any number past the tokens is no limit.
    const int32_t right = p.packing.right < 0 ? p.packing.tokens : min(p.packing.right, p.packing.tokens);
    hide_where(
        s, band, tile.key, [row = tile.row()](int slot) { return row + S::row(slot); },
        [&](int, int32_t i, int32_t j) {
          const int32_t token = i >> p.packing.shift;
          return j - first > token + right || drafts.hides(token, j);
        });
  }
};

}  // namespace jax_flash
