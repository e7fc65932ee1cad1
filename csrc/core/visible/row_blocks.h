// The keys that each block of query rows sees by the band and by ranges. A kernel computes them once per call
// (cuda/ranges.cu), and the kernels of score kind Ranges skip key tiles with them.
#pragma once

#include "ranges.h"

namespace jax_flash {

inline constexpr int32_t kRowBlock = 64;  // rows of a block, and of a consumer warpgroup

// No row sees a key outside `any` or inside `gap`, which lies within `any`. Every row sees all keys of both
// intervals in `whole`.
struct alignas(16) SeenByBlock {
  Interval any, gap, whole[2];
};

// The same for a query tile, which consists of several blocks.
struct alignas(16) SeenByTile {
  Interval any, gap;
};

// Removes from `gap` the keys `seen` of a row without a hole. If that would cut the gap in two, only the part
// after these keys is kept.
JF_HD Interval shrink_gap(Interval gap, Interval seen) {
  if (seen.empty() || seen.hi <= gap.lo || gap.hi <= seen.lo) return gap;
  if (seen.hi >= gap.hi) return {gap.lo, seen.lo};
  return {seen.hi, gap.hi};
}

// Accumulates over rows in any order. Threads merge their partial results in the same way.
struct LimitsOfRows {
  Interval any{INT32_MAX, 0};     // the smallest lo, the largest hi
  Interval all{0, INT32_MAX};     // the largest lo, the smallest hi
  Interval hole{0, INT32_MAX};    // the intersection of the holes of rows that have one
  int32_t first_end = INT32_MAX,  // the smallest end of a row's first range
      last_begin = 0;             // the largest begin of a row's last range

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

  // `gap`: the intersection of the holes, after shrink_gap() of each row without a hole.
  JF_HD SeenByBlock seen(Interval gap) const {
    if (any.empty()) return {{0, 0}, {0, 0}, {{0, 0}, {0, 0}}};
    return {any, gap.empty() ? Interval{0, 0} : gap, {{all.lo, first_end}, {last_begin, all.hi}}};
  }
};

// The number of slots that a table of blocks or tiles of `block` rows has for each leading entry. A batch
// entry or packed sequence has consecutive slots. `rows`: the rows of a batch entry, or of all packed
// sequences together.
JF_HD int64_t slots_of_entry(bool packed, int64_t rows, int64_t batch, int64_t block) {
  return packed ? rows / block + batch : batch * ((rows + block - 1) / block);
}
// The first slot of a sequence that begins at row `begin`.
JF_HD int64_t first_slot_of(const Problem& p, int64_t leading, int32_t index, int32_t begin, int32_t rows,
                            int32_t block) {
  const int64_t before = leading * slots_of_entry(p.packed(), rows, p.batch, block);
  return before + (p.packed() ? begin / block + index : index * ((rows + block - 1) / block));
}

}  // namespace jax_flash
