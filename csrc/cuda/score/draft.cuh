// The draft mask: S ← −inf where a row does not see a new token.
#pragma once

#include <cmath>

#include "core/visible/elements.h"
#include "cuda/score/operands.cuh"

namespace jax_flash {

// S ← −inf where hidden(slot, i, j), which is called only for rows and keys in use. Row i is row_of(slot),
// and the first key is `key`. Where few tiles run the loop, it is not unrolled (kUnroll = 1), because its
// loads would take registers from all other tiles.
template <int kUnroll = 1, class S, class Row, class Hidden>
__device__ __forceinline__ void hide_where(S& s, const Band& band, int32_t key, Row row_of, Hidden hidden) {
  static_assert(2 * S::kColumnTiles <= 32);
#pragma unroll
  for (int slot = 0; slot < S::kSlots; ++slot) {
    const int32_t i = row_of(slot), end = i < band.q_len ? band.k_len : 0;
    uint32_t found = 0;  // bit 2 n + e
#pragma unroll kUnroll
    for (int at = 0; at < 2 * S::kColumnTiles; ++at) {
      const int32_t j = key + S::column(at / 2, at % 2);
      if (j < end && hidden(slot, i, j)) found |= 1u << at;
    }
#pragma unroll
    for (int n = 0; n < S::kColumnTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (found >> (2 * n + e) & 1) s.at(slot, n, e) = -INFINITY;
    }
  }
}

// S ← −inf where the draft mask of a sequence hides the key.
template <class S, class Row>
__device__ __forceinline__ void hide_drafts(S& s, const ElementMask& draft, const Band& band, int32_t key,
                                            Row row_of) {
  if (!draft.reaches(key + S::kColumns)) return;
  hide_where(s, band, key, row_of, [&](int, int32_t i, int32_t j) { return draft.hides(i, j); });
}

// Adds the draft mask of calls over pages to a score variant.
template <class Score>
struct WithDraftMask : Score {
  static constexpr bool kPositional = true;
  static constexpr bool reads(Operand operand) {
    return operand == Operand::kDraftMask || Score::reads(operand);
  }
  template <class S, class Tile, class Softmax>
  __device__ __forceinline__ void apply(S& s, const Tile& tile, const Softmax& softmax) {
    Score::apply(s, tile, softmax);
    const uint8_t* const seen = tile.operands().draft;
    if (!seen) return;
    const Band& band = tile.band();
    hide_drafts(s, {seen, tile.p.draft_mask.row, first_draft(band.q_len, band.k_len)}, band, tile.key,
                [row = tile.row()](int slot) { return row + S::row(slot); });
  }
};

}  // namespace jax_flash
