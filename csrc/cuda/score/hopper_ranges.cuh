// Calls on sm_90a whose only score option is ranges. Kernels skip key tiles that no row of a query tile sees,
// and mask only tiles in which some row does not see all keys (cuda/ranges.cu).
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/score/lane_bits.cuh"
#include "cuda/score/ranges.cuh"
#include "cuda/score/variant.cuh"

namespace jax_flash {

template <class S>
struct RangesScore : ScoreVariant<S> {
  static constexpr bool reads(Operand operand) { return operand == Operand::kRanges; }

  // By slot, a bit for each of the lane's elements of a partial tile, in their order: whether the row sees
  // the key.
  uint32_t seen[S::kSlots];

  // Finds `seen` while the tensor cores compute S. `key`: the tile's first.
  template <class Tile>
  __device__ __forceinline__ void find_seen(const Tile& tile, int32_t key) {
    static_assert(2 * S::kColumnTiles <= 32 && S::kColumns == 8 * S::kColumnTiles);
    const RowRanges ranges = tile.operands().row_ranges(tile.p);
    LimitsOfRow limits[S::kSlots];
    load_limits<S>(limits, tile, ranges);
    const int32_t first = key + S::column(0), in_sequence = first + tile.keys_before();
#pragma unroll
    for (int slot = 0; slot < S::kSlots; ++slot) {
      const Interval band = columns_from(first, tile.in_band(tile.row() + S::row(slot)));
      const auto bits_of = [&](const int2& range) {
        return bits_of_columns(intersect(columns_from(in_sequence, {range.x, range.y}), band));
      };
      seen[slot] = bits_of(limits[slot].first);
      if (ranges.two) seen[slot] |= bits_of(limits[slot].second);
    }
  }

  // The same for a tile in which all rows see all keys.
  __device__ __forceinline__ void see_all() {
#pragma unroll
    for (uint32_t& own : seen) own = kAllElements<S>;
  }

  // S ← −inf outside of the band and the ranges. Unused rows may keep any score.
  template <class Scores>
  __device__ __forceinline__ void hide(Scores& s) const {
    hide_unless_seen(s, seen);
  }
};

}  // namespace jax_flash
