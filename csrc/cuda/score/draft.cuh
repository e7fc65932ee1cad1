// The draft mask: S ← −inf where a row does not see a new token.
#pragma once

#include <cmath>

#include "core/draft.h"
#include "cuda/score/operands.cuh"

namespace jax_flash {

// S [rows row_of(slot), keys from `key`] ← −inf where the draft mask of a sequence hides the key.
// row_of(slot) must be below band.q_len, or the row is not in use and its scores may be anything.
template <class S, class Row>
__device__ __forceinline__ void hide_drafts(S& s, const DraftMask& draft, const Band& band, int32_t key,
                                            Row row_of) {
  if (!draft.reaches(key + S::kColumns)) return;
#pragma unroll
  for (int slot = 0; slot < S::kSlots; ++slot) {
    const int32_t i = row_of(slot), end = i < band.q_len ? band.k_len : 0;
#pragma unroll
    for (int n = 0; n < S::kColumnTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int32_t j = key + S::column(n, e);
        if (j < end && draft.hides(i, j)) s.at(slot, n, e) = -INFINITY;
      }
    }
  }
}

// A score variant, and the draft mask of calls over pages.
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
