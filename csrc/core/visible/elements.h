// The boolean operands `mask` and `draft_mask`, which say element by element which keys a row sees. A mask
// has a column for each key of the sequence. A draft mask has columns only for the new tokens, which are the
// last keys; the band alone decides about earlier keys.
#pragma once

#include <cstdint>

#include "../problem.h"
#include "../sequence.h"

namespace jax_flash {

// The mask of one sequence and query head, with a column for each key from `first` on. Rows and keys must lie
// within the sequence's lengths.
struct ElementMask {
  const uint8_t* seen = nullptr;  // [row, key - first]; null: hides nothing
  int64_t row = 0;                // stride of rows, in elements
  int32_t first = INT32_MAX;      // key of column 0; negative if a draft has more rows than keys

  JF_HD explicit operator bool() const { return seen != nullptr; }
  // Whether it has a column for some of the keys before `end`.
  JF_HD bool reaches(int32_t end) const { return end > first; }
  JF_HD bool hides(int32_t i, int32_t j) const { return j >= first && !seen[i * row + (j - first)]; }
};

// The masks from one query head on. A stride is 0 if all heads have one mask, or all keys one column.
struct MaskOfHeads : ElementMask {
  int64_t head = 0, column = 1;

  // The element of key j, which may lie before column 0.
  JF_HD const uint8_t* at(int32_t h, int32_t i, int32_t j) const {
    return seen + h * head + i * row + (j - first) * column;
  }
  JF_HD bool hides(int32_t h, int32_t i, int32_t j) const { return j >= first && !*at(h, i, j); }
};

// Whether the draft mask applies to a sequence. It does not if the sequence has more rows than the mask.
JF_HD bool has_drafts(int32_t q_len, int32_t draft_rows) { return q_len <= draft_rows; }

JF_HD int32_t first_draft(int32_t q_len, int32_t k_len) { return k_len - q_len; }

// The operand of a call, from query head `first` on. Only calls over pages have a draft mask, and only others
// have a mask.
JF_HD MaskOfHeads masks_of_heads(const Problem& p, int64_t leading, const Sequence& s, int32_t first) {
  const View& view = p.draft_mask ? p.draft_mask : p.mask;
  if (!view || (p.draft_mask && !has_drafts(s.q_len, p.draft_rows))) return {};
  const int64_t offset = view.leading_offset(p.leading, leading) + view.offset(s.index, first, 0);
  const auto* seen = view.as<const uint8_t>() + offset;
  if (p.draft_mask) return {{seen, view.row, first_draft(s.q_len, s.k_len)}};
  return {{seen, view.row, 0}, view.head, view.column};
}

}  // namespace jax_flash
