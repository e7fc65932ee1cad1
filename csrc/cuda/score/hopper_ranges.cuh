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

  // By slot, a bit for each of the lane's elements of a partial tile, in their order: whether the row sees
  // the key.
  uint32_t seen[S::kSlots];
  LimitsOfRow limits[S::kSlots];

  // Must be called before find_seen(), as early as registers allow.
  template <class Tile>
  __device__ __forceinline__ void load_limits(const Tile& tile) {
    const RowRanges ranges = tile.operands().row_ranges(tile.p);
#pragma unroll
    for (int slot = 0; slot < S::kSlots; ++slot)  // limits of rows past the sequence must not be read
      limits[slot].load(ranges, min(tile.row() + S::row(slot), tile.band().q_len - 1));
  }
  // Finds `seen` while the tensor cores compute S. `key`: the tile's first.
  template <class Tile>
  __device__ __forceinline__ void find_seen(const Tile& tile, int32_t key) {
    static_assert(2 * S::kColumnTiles <= 32 && S::kColumns == 8 * S::kColumnTiles);
#pragma unroll
    for (int slot = 0; slot < S::kSlots; ++slot) {
      const Interval band = tile.in_band(tile.row() + S::row(slot), {key, key + S::kColumns});
      const int2 first = limits[slot].first, second = limits[slot].second;
      const int32_t at = key + tile.keys_before();
      seen[slot] = bits(band, key) & (bits({first.x, first.y}, at) | bits({second.x, second.y}, at));
    }
  }

  // The same for a tile in which all rows see all keys.
  __device__ __forceinline__ void see_all() {
#pragma unroll
    for (uint32_t& own : seen) own = ~0u;
  }

  // S ← −inf outside of the band and the ranges. Unused rows may keep any score. The vote tells the compiler
  // that the branch is uniform.
  template <class Scores>
  __device__ __forceinline__ void hide(Scores& s) const {
    bool all = true;
#pragma unroll
    for (uint32_t own : seen) all &= (~own & before(Scores::kColumns)) == 0;
    if (__all_sync(~0u, all)) return;
#pragma unroll
    for (int slot = 0; slot < Scores::kSlots; ++slot) {
#pragma unroll
      for (int n = 0; n < Scores::kColumnTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (!(seen[slot] >> (2 * n + e) & 1)) s.at(slot, n, e) = -INFINITY;
      }
    }
  }

 private:
  // The bits of the lane's elements in columns before `column`, which the lane's first column is subtracted
  // from. A lane has two of eight columns.
  __device__ __forceinline__ static uint32_t before(int32_t column) {
    const int32_t x = max(column, 0), count = x / 8 * 2 + min(x % 8, 2);
    return count < 32 ? (1u << count) - 1 : ~0u;
  }
  // The bits of the lane's elements in a tile that starts with `key`. Limits may be any numbers.
  __device__ __forceinline__ static uint32_t bits(const Interval& keys, int32_t key) {
    const int32_t end = key + S::kColumns, first = key + S::column(0);
    return before(max(key, min(keys.hi, end)) - first) & ~before(max(key, min(keys.lo, end)) - first);
  }
};

}  // namespace jax_flash
