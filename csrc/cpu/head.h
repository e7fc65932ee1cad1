// The rows, band and score options of one query head of a sequence, or of several query heads that read the
// same KV head.
#pragma once

#include "isa.h"
// isa.h goes first: it makes the core force-inlined.
#include "../core/band.h"
#include "../core/dropout.h"
#include "../core/problem.h"
#include "../core/score.h"
#include "../core/visible/blocks.h"
#include "../core/visible/elements.h"
#include "../core/visible/ranges.h"
#include "convert.h"
#include "product.h"

namespace jax_flash::JF_ISA {

// A row of S: a query position within the sequence and a query head.
struct Row {
  int32_t position, head;
};

// Operands that hide keys or drop weights, and do not change the other scores.
inline constexpr int32_t kLeaveScores =
    bits_of(Operand::kQSegmentIds, Operand::kKvSegmentIds, Operand::kMask, Operand::kDropout,
            Operand::kDraftMask, Operand::kRanges, Operand::kBlockMask);

// Whether a score needs more than scale, dropout and masks. A scale of 0 counts as an option, because it
// would turn masked scores, -inf, into NaN.
JF_INLINE bool has_score_options(const Problem& p) {
  return p.spec.softcap > 0 || p.spec.scale == 0 || p.spec.operands & ~(kOfEveryKernel | kLeaveScores);
}

// The factor of S in the exponent, exp(softmax_scale (S − m)). With score options the scale is part of S,
// and the factor is 1.
JF_INLINE float softmax_scale_of(const Problem& p) {
  return has_score_options(p) ? 1.0f : __builtin_fabsf(p.spec.scale);
}

// bf16 problems use the bf16 dot instruction, except for those with few keys: the rounding errors of P and
// dS to bf16 do not average out over few keys, and float32 takes no longer there.
inline constexpr int32_t kMinKeysForPairs = 128;  // keys
JF_INLINE bool uses_bf16_pairs(const Problem& p, int32_t keys) {
  return p.dtype == DType::kBF16 && keys >= kMinKeysForPairs;
}
JF_INLINE bool uses_bf16_pairs(const Problem& p) { return uses_bf16_pairs(p, p.k_rows); }

struct Head {
  const Problem& problem;
  Sequence sequence;
  Band band;
  RowRanges ranges;  // of `head` and the query heads after it
  BlockMask blocks;  // likewise
  MaskOfHeads mask;  // likewise
  int32_t head;      // the first query head
  Rows query, key, value;
  // S = query_sign q·k. Without score options the score is softmax_scale · S; with them finish_scores
  // computes it from S. S and its maximum are not scaled, so that a large scale does not magnify their
  // rounding errors.
  float query_sign, softmax_scale;
  bool has_options;
  bool hides_panels;  // `mask` or `blocks` may hide panels of keys
  bool has_dropout;
  Dropout dropout;
  int64_t leading;

  Head(const Problem& p, int64_t leading_, const Sequence& s, int32_t head_)
      : problem(p),
        sequence(s),
        band(make_band(p, leading_, s)),
        ranges(row_ranges(p, leading_, s, head_)),
        blocks(block_mask_of(p, leading_, s, head_)),
        mask(masks_of_heads(p, leading_, s, head_)),
        head(head_),
        leading(leading_) {
    query = rows(p.query, p.head_dim, s.q_begin, head);
    key = keys(p.key, p.head_dim, p.k_scale, __builtin_nanf(""));
    value = keys(p.value, p.value_dim, p.v_scale, 0.0f);
    query_sign = p.spec.scale < 0 ? -1.0f : 1.0f;
    has_options = has_score_options(p);
    hides_panels = mask || blocks;
    softmax_scale = softmax_scale_of(p);
    has_dropout = p.spec.dropout_rate > 0;
    if (has_dropout) dropout = make_dropout(p.spec, p.dropout, p.dropout.leading_offset(p.leading, leading));
  }

  // The rows of a per-token operand or gradient from sequence row `begin` at head h, which is a KV head if
  // the operand has KV heads.
  JF_HD Rows rows(const View& view, int32_t width, int32_t begin, int32_t h) const {
    const int64_t size = size_of(problem.dtype);
    const int64_t offset =
        view.leading_offset(problem.leading, leading) + view.offset(sequence.batch_row, h, begin);
    return {view.as<char>() + offset * size, view.row * size, problem.dtype, width};
  }

  // Keys or values at the KV head. Rows of a page outside the pool read as `missing`: NaN for keys, so that
  // the scores are NaN, and 0 for values, so that only the scores are NaN.
  JF_HD Rows keys(const View& view, int32_t width, const View& scale, float missing) const {
    const Problem& p = problem;
    const int32_t h = p.kv_head(head);
    if (!p.paged()) return rows(view, width, sequence.k_begin, h);
    const int64_t size = size_of(p.kv_dtype), start = view.leading_offset(p.leading, leading) + h * view.head;
    Rows found{view.as<char>() + start * size, view.row * size, p.kv_dtype, width};
    if (scale && scale.batch == 0) found.factor = at(scale, h * scale.head);
    if (scale && scale.batch != 0) {
      found.page_factors =
          scale.as<const float>() + scale.leading_offset(p.leading, leading) + h * scale.head;
      found.page_factor_stride = scale.batch;
    }
    found.missing = missing;
    found.table = page_table(p.block_tables, p.leading, leading, sequence.index, p.page_size, p.pages);
    found.page_stride = view.batch * size;
    return found;
  }

  // An element of a small float32 operand.
  JF_HD float at(const View& view, int64_t offset) const {
    return view.as<const float>()[view.leading_offset(problem.leading, leading) + offset];
  }

  // Whether segments, ranges or masks may hide keys within the band.
  JF_HD bool is_sparse() const { return problem.q_segment_ids || ranges || hides_panels; }

  // The keys of an interval that a row sees through band and ranges; segments, masks and bias may hide more.
  JF_HD SeenKeys seen(Row row, Interval keys) const {
    return ranges.seen(row.head - head, row.position, intersect(band.row(row.position), keys));
  }

  // The smallest interval that holds all of these columns that a row sees; column 0 is key j0.
  JF_HD Columns seen_columns(Row row, int32_t j0, Columns columns) const {
    const Interval keys = seen(row, {j0 + columns.lo, j0 + columns.hi}).hull;
    return keys.empty() ? Columns{0, 0} : Columns{keys.lo - j0, keys.hi - j0};
  }

  // The keys of an interval that rows [begin, end) at `heads` query heads see.
  JF_HD SeenByRows seen(QueryRange rows, Interval keys) const {
    return seen_by_rows(band, ranges, rows, keys);
  }
  JF_HD Interval seen_by_any(QueryRange rows, Interval keys) const {
    return jax_flash::seen_by_any(band, ranges, rows, keys);
  }
  JF_HD Interval seen_by_any(QueryRange rows) const { return seen_by_any(rows, {0, band.k_len}); }

  // lse or delta of the head, from row 0 of the sequence.
  JF_HD float* row_statistic(const View& view) const {
    return view.as<float>() + view.leading_offset(problem.leading, leading) +
           view.offset(sequence.batch_row, head, sequence.q_begin);
  }

  JF_HD Rows dout() const { return rows(problem.dout, problem.value_dim, sequence.q_begin, head); }

  // Panels whose S needs finish_scores before the softmax. `mixed`: panels in which segments, masks or a hole
  // between two ranges may hide keys.
  JF_HD uint64_t unfinished(uint64_t mixed) const { return has_options ? kAllPanels : mixed; }

  // Defined in scores.h. Replaces S[c], the product with key j0 + c, by the final score, -inf where hidden,
  // in all vectors that overlap `visible`. If `mixed` is false, segments, ranges and masks hide none of these
  // keys. Stores the derivative of the softcap in `slopes` unless that is null. Returns the maximum, lane by
  // lane.
  Float finish_scores(Row row, int32_t j0, Columns visible, bool mixed, float* s, float* slopes) const;

  // Defined in scores.h. Fills `to`, in all vectors that overlap `visible`, with the tangent of the bias, and
  // with 0 outside `visible`.
  void bias_tangent_row(const View& tbias, Row row, int32_t j0, Columns visible, float* to) const;

  // Defined in dropout.h. Fills `keep` in all vectors that overlap `visible`: 0 where dropped, else 1 / (1 -
  // rate).
  void dropout_row(Row row, int32_t j0, Columns visible, float* keep) const;
};

// Scratch for one row: a value per column of a tile, and room for vectors and Philox blocks that reach past
// the last column.
struct alignas(64) RowBuffer {
  float value[kTileN + 2 * kLanes];
};

JF_INLINE Columns vectors(Columns c) { return {round_down(c.lo, kLanes), round_up(c.hi, kLanes)}; }

// Bump allocation from a kernel's scratch.
struct Scratch {
  float* next;

  JF_HD float* take(int64_t floats) {
    float* p = next;
    next += (floats + 15) / 16 * 16;
    return p;
  }
};

}  // namespace jax_flash::JF_ISA
