// The draft mask: S ← −inf where a row does not see a new token.
#pragma once

#include "core/visible/elements.h"
#include "cuda/score/elements.cuh"
#include "cuda/score/operands.cuh"

namespace jax_flash {

// S ← −inf where the draft mask of a sequence hides the key.
template <class S, class Row>
__device__ __forceinline__ void hide_drafts(S& s, const ElementMask& draft, const Band& band, int32_t key,
                                            Row row_of) {
  if (!draft.reaches(key + S::kColumns)) return;
  hide_where(s, band, key, row_of, [&](int32_t i, int32_t j) { return draft.hides(i, j); });
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
