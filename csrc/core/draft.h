// The draft mask says which new tokens each query row of a sequence sees; the new tokens are the sequence's
// last keys. The band alone decides about earlier keys.
#pragma once

#include <cstdint>

#include "problem.h"
#include "sequence.h"

namespace jax_flash {

struct DraftMask {
  const uint8_t* seen = nullptr;  // [row, key - first]; null: hides nothing
  int64_t row = 0;                // stride of rows, in elements
  int32_t first = INT32_MAX;      // key of column 0; negative: more rows than keys

  // Whether some of the keys before `end` are new tokens.
  JF_HD bool reaches(int32_t end) const { return end > first; }
  // `i` and `j` must lie within the sequence's lengths.
  JF_HD bool hides(int32_t i, int32_t j) const { return j >= first && !seen[i * row + (j - first)]; }
};

// Whether the draft mask applies to a sequence. It does not if the sequence has more rows than the mask.
JF_HD bool has_drafts(int32_t q_len, int32_t draft_rows) { return q_len <= draft_rows; }

JF_HD int32_t first_draft(int32_t q_len, int32_t k_len) { return k_len - q_len; }

JF_HD DraftMask draft_mask_of(const Problem& p, int64_t leading, const Sequence& s) {
  const View& view = p.draft_mask;
  if (!view || !has_drafts(s.q_len, p.draft_rows)) return {};
  const int64_t offset = view.leading_offset(p.leading, leading) + view.offset(s.index, 0, 0);
  return {view.as<const uint8_t>() + offset, view.row, first_draft(s.q_len, s.k_len)};
}

}  // namespace jax_flash
