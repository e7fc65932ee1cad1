// What blocks of query rows see by the band and by ranges: a kernel finds it once per call (cuda/ranges.cu),
// and those of score kind Ranges skip tiles by it.
#pragma once

#include "ranges.h"

namespace jax_flash {

inline constexpr int32_t kRowBlock = 64;  // rows of a block: a consumer warpgroup's

// No row sees a key outside of `any`, or in `gap`, a part of it; all rows see all keys in each of `whole`.
struct alignas(16) SeenByBlock {
  Interval any, gap, whole[2];
};

// The same of a tile of several blocks.
struct alignas(16) SeenByTile {
  Interval any, gap;
};

// `gap` without what a row sees that has no hole around it.
JF_HD Interval shrink_gap(Interval gap, Interval seen) {
  if (seen.empty() || seen.hi <= gap.lo || gap.hi <= seen.lo) return gap;
  if (seen.hi >= gap.hi) return {gap.lo, seen.lo};
  return {seen.hi, gap.hi};
}

// Collects the limits of rows, or of threads' rows, in any order.
struct LimitsOfRows {
  Interval any{INT32_MAX, 0};   // the smallest lo, the largest hi
  Interval all{0, INT32_MAX};   // the largest lo, the smallest hi
  Interval hole{0, INT32_MAX};  // in the holes of all rows that have one
  int32_t first_end = INT32_MAX,
          last_begin = 0;  // of what all rows see from their first, up to their last key

  JF_HD void add(const SeenKeys& row) {
    if (row.hull.empty()) return add({{INT32_MAX, 0}, {INT32_MAX, 0}, {0, INT32_MAX}, 0, INT32_MAX});
    const bool two = !row.hole.empty();
    add({row.hull, row.hull, two ? row.hole : Interval{0, INT32_MAX}, two ? row.hole.lo : row.hull.hi,
         two ? row.hole.hi : row.hull.lo});
  }
  JF_HD void add(const LimitsOfRows& x) {
    any = {x.any.lo < any.lo ? x.any.lo : any.lo, x.any.hi > any.hi ? x.any.hi : any.hi};
    all = intersect(all, x.all);
    hole = intersect(hole, x.hole);
    first_end = x.first_end < first_end ? x.first_end : first_end;
    last_begin = x.last_begin > last_begin ? x.last_begin : last_begin;
  }
  JF_HD bool have_hole() const { return hole.hi < INT32_MAX && !hole.empty(); }

  // `gap`: the hole, less what rows without one see of it.
  JF_HD SeenByBlock seen(Interval gap) const {
    if (any.empty()) return {{0, 0}, {0, 0}, {{0, 0}, {0, 0}}};
    return {any, gap.empty() ? Interval{0, 0} : gap, {{all.lo, first_end}, {last_begin, all.hi}}};
  }
};

// The slots of blocks or tiles of `block` rows in a table: those of a batch entry or a packed sequence follow
// each other. `rows`: of an entry, or of all sequences.
JF_HD int64_t slots_of_entry(bool packed, int64_t rows, int64_t batch, int64_t block) {
  return packed ? rows / block + batch : batch * ((rows + block - 1) / block);
}
// The first of a sequence that begins at row `begin`.
JF_HD int64_t first_slot_of(const Problem& p, int64_t leading, int32_t index, int32_t begin, int32_t rows,
                            int32_t block) {
  const int64_t before = leading * slots_of_entry(p.packed(), rows, p.batch, block);
  return before + (p.packed() ? begin / block + index : index * ((rows + block - 1) / block));
}

}  // namespace jax_flash
