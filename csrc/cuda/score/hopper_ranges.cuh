// Calls on sm_90a whose only score option is ranges. Kernels skip key tiles that no row of a query tile sees,
// and mask only tiles in which some row does not see all keys (cuda/ranges.cu).
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/score/ranges.cuh"
#include "cuda/score/variant.cuh"

namespace jax_flash {

template <class S>
struct RangesScore : ScoreVariant<S> {
  static constexpr bool reads(Operand operand) { return operand == Operand::kRanges; }

  // S ← −inf outside of the band and the ranges. Unused rows may keep any score. Kernels with small key tiles
  // have large head dims, which leave registers for one row at a time.
  template <class Scores, class Tile>
  __device__ __forceinline__ static void hide(Scores& s, const Tile& tile, int32_t key) {
    constexpr int kTogether = Scores::kColumnTiles >= 16 ? Scores::kSlots : 1;
#pragma unroll
    for (int slot = 0; slot < Scores::kSlots; slot += kTogether) hide_rows<kTogether>(s, tile, key, slot);
  }

 private:
  // hide() for kCount slots from `slot` on. Votes tell the compiler that branches are uniform.
  template <int kCount, class Scores, class Tile>
  __device__ __forceinline__ static void hide_rows(Scores& s, const Tile& tile, int32_t key, int slot) {
    const RowRanges ranges = tile.operands().row_ranges(tile.p);
    SeenKeys seen[kCount];
    bool begins = false, ends = false, holes = false;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int32_t row = tile.row() + Scores::row(slot + i), end = key + Scores::kColumns;
      seen[i] = ranges.seen(0, row, tile.in_band(row, {key, end}));
      begins |= seen[i].hull.lo > key;
      ends |= seen[i].hull.hi < end;
      holes |= !seen[i].hole.empty();
    }
    const auto hide_where = [&](auto hidden) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const int32_t first = key + Scores::column(0);
        const Interval hull{seen[i].hull.lo - first, seen[i].hull.hi - first};
        const Interval hole{seen[i].hole.lo - first, seen[i].hole.hi - first};
#pragma unroll
        for (int n = 0; n < Scores::kColumnTiles; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e)
            if (hidden(Scores::column_step(n, e), hull, hole)) s.at(slot + i, n, e) = -INFINITY;
        }
      }
    };
    if (__any_sync(~0u, begins)) hide_where([](int x, Interval hull, Interval) { return x < hull.lo; });
    if (__any_sync(~0u, ends)) hide_where([](int x, Interval hull, Interval) { return x >= hull.hi; });
    if (__any_sync(~0u, holes)) hide_where([](int x, Interval, Interval hole) { return hole.contains(x); });
  }
};

}  // namespace jax_flash
