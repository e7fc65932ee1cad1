// The operand `ranges`, with one or two ranges of keys for each row. A row sees the keys in its ranges that
// the band and the lengths do not hide.
#pragma once

#include "../band.h"

namespace jax_flash {

// A row sees the keys in `hull` that are not in `hole`, the gap between the row's two ranges.
struct SeenKeys {
  Interval hull, hole;

  JF_HD bool contains(int32_t j) const { return hull.contains(j) && !hole.contains(j); }
};

// The smallest interval that contains both; {0, 0} if both are empty.
JF_HD Interval hull_of(Interval a, Interval b) {
  if (a.empty()) return b.empty() ? Interval{0, 0} : b;
  if (b.empty()) return a;
  return {a.lo < b.lo ? a.lo : b.lo, a.hi > b.hi ? a.hi : b.hi};
}

// The ranges of the rows of one sequence, from one query head on. Limits may hold any numbers.
struct RowRanges {
  const int32_t* limits = nullptr;  // lo and hi of each range; null: every row sees all keys
  int64_t head = 0, row = 0;        // strides, in elements
  bool two = false;                 // each row has two ranges, else one

  JF_HD explicit operator bool() const { return limits != nullptr; }

  // `keys`: the keys that the band leaves to the row; empty for a row past the sequence's length, whose
  // limits must not be read.
  JF_HD SeenKeys seen(int32_t h, int32_t i, Interval keys) const {
    if (!limits || keys.empty()) return {keys, {0, 0}};
    const int32_t* x = limits + h * head + i * row;
    const Interval first = intersect({x[0], x[1]}, keys);
    if (!two) return {hull_of(first, {0, 0}), {0, 0}};
    const Interval second = intersect({x[2], x[3]}, keys);
    if (first.empty() || second.empty()) return {hull_of(first, second), {0, 0}};
    return {hull_of(first, second),
            {first.hi < second.hi ? first.hi : second.hi, first.lo > second.lo ? first.lo : second.lo}};
  }
};

// The ranges from query head `first` on.
JF_HD RowRanges row_ranges(const Problem& p, int64_t leading, const Sequence& s, int32_t first) {
  const View& view = p.ranges;
  if (!view) return {};
  const int64_t offset = view.leading_offset(p.leading, leading) + view.offset(s.batch_row, first, s.q_begin);
  return {view.as<const int32_t>() + offset, view.head, view.row, p.limits == 4};
}

// Query rows [begin, end) of a sequence, at the first `heads` query heads of its RowRanges.
struct QueryRange {
  int32_t begin, end;
  int32_t heads = 1;
};

// The keys of an interval that a set of rows sees. No row sees a key outside `any`; every row sees all keys
// in `all`. `holes`: some row does not see a key between two keys that it sees. `gap`: keys between those of
// the two ranges of every row that sees any.
struct SeenByRows {
  Interval any{0, 0}, all{0, 0};
  bool holes = false;
  Interval gap{0, 0};
};

JF_HD SeenByRows seen_by_rows(const Band& band, const RowRanges& ranges, QueryRange rows, Interval keys) {
  SeenByRows found;
  found.any = intersect(band.rows(rows.begin, rows.end), keys);
  found.all = intersect(band.common(rows.begin, rows.end), keys);
  if (!ranges || found.any.empty()) return found;
  const Interval in_band = found.any;
  const int32_t heads = ranges.head != 0 ? rows.heads : 1;
  const int32_t end = rows.end < band.q_len ? rows.end : band.q_len;
  found.any = {0, 0}, found.gap = in_band;
  for (int32_t h = 0; h < heads; ++h) {
    for (int32_t i = rows.begin; i < end; ++i) {
      const SeenKeys own = ranges.seen(h, i, intersect(band.row(i), in_band));
      found.any = hull_of(found.any, own.hull);
      found.all = intersect(found.all, own.hull);
      found.holes |= !own.hole.empty();
      if (!own.hull.empty()) found.gap = intersect(found.gap, own.hole);
    }
  }
  if (found.holes) found.all = {0, 0};
  if (found.any.empty() || found.gap.empty()) found.gap = {0, 0};
  return found;
}

// An interval of `keys` that holds every key that the rows see.
JF_HD Interval seen_by_any(const Band& band, const RowRanges& ranges, QueryRange rows, Interval keys) {
  if (!ranges) return intersect(band.rows(rows.begin, rows.end), keys);
  return seen_by_rows(band, ranges, rows, keys).any;
}

}  // namespace jax_flash
