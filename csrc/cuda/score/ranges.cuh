// The operand `ranges`: S ← −inf where no range of the row holds the key.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/visible/ranges.h"
#include "cuda/ptx/barrier.cuh"

namespace jax_flash {

// S of the keys from `key` on ← −inf where the slot's row does not see the key. seen(slot): the keys that it
// sees.
template <class S, class Seen>
__device__ __forceinline__ void hide_unseen(S& s, int32_t key, Seen seen) {
  const int32_t first = key + S::column(0);
#pragma unroll
  for (int slot = 0; slot < S::kSlots; ++slot) {
    const SeenKeys own = seen(slot);
    const Interval hull = own.hull.empty() ? Interval{first, first} : own.hull;
    if (hull.lo > key || hull.hi < key + S::kColumns) {
      const int32_t lo = hull.lo - first, hi = hull.hi - first;
#pragma unroll
      for (int n = 0; n < S::kColumnTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int column = S::column_step(n, e);
          if (column < lo || column >= hi) s.at(slot, n, e) = -INFINITY;
        }
      }
    }
    if (!own.hole.empty()) {
      const int32_t lo = own.hole.lo - first, hi = own.hole.hi - first;
#pragma unroll
      for (int n = 0; n < S::kColumnTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int column = S::column_step(n, e);
          if (column >= lo && column < hi) s.at(slot, n, e) = -INFINITY;
        }
      }
    }
  }
}

// A bit per key from `key` on, set for `keys`, in a tile of fewer than 32 keys.
__device__ __forceinline__ uint32_t bits_of_keys(const Interval& keys, int32_t key) {
  return keys.empty() ? 0 : (1u << (keys.hi - key)) - (1u << (keys.lo - key));
}

// The limits of a row's ranges. They are loaded early, as they take some 700 cycles to arrive from L2.
struct LimitsOfRow {
  int2 first, second;

  __device__ __forceinline__ void load(const RowRanges& ranges, int32_t row) {
    const auto* const limits = reinterpret_cast<const int2*>(ranges.limits + row * ranges.row);
    first = __ldg(limits), second = ranges.two ? __ldg(limits + 1) : int2{0, 0};
  }
  // The bits of `keys`, which lie in a tile of fewer than 32 keys from `key` on, that the row sees.
  __device__ __forceinline__ uint32_t bits(const Interval& keys, int32_t key) const {
    return bits_of_keys(intersect({first.x, first.y}, keys), key) |
           bits_of_keys(intersect({second.x, second.y}, keys), key);
  }
};

// Loads the limits of the lane's rows, by slot. Limits of rows past the sequence must not be read.
template <class S, class Tile>
__device__ __forceinline__ void load_limits(LimitsOfRow (&limits)[S::kSlots], const Tile& tile,
                                            const RowRanges& ranges) {
#pragma unroll
  for (int slot = 0; slot < S::kSlots; ++slot)
    limits[slot].load(ranges, min(tile.row() + S::row(slot), tile.band().q_len - 1));
}

// Which of a warp's few keys its rows see, for a transposed S. A lane has too many rows to read all of their
// ranges, so the lanes divide the rows: word i of a lane has the bits of row 32 i + its number.
template <class S>
struct SeenByLanes {
  static constexpr int kWords = (S::kRows + 31) / 32;
  uint32_t bits[kWords];

  // seen(i): the keys that row i sees.
  template <class Seen>
  __device__ __forceinline__ void find(int32_t row, int32_t key, Seen seen) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const SeenKeys own = seen(row + 32 * i + ptx::thread_index() % 32);
      bits[i] = bits_of_keys(own.hull, key) & ~bits_of_keys(own.hole, key);
    }
  }
};

// Hides keys of a transposed S whose bit is 0 from all rows.
template <class S>
__device__ __forceinline__ void hide_unseen_of_all_rows(S& s, uint32_t bits) {
  constexpr uint32_t kAll = (1u << S::kColumns) - 1;
  if (__all_sync(~0u, bits == kAll)) return;
  const uint32_t seen = bits >> S::column(0);
#pragma unroll
  for (int n = 0; n < S::kColumnTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if (seen >> S::column_step(n, e) & 1) continue;
#pragma unroll
      for (int slot = 0; slot < S::kSlots; ++slot) s.at(slot, n, e) = -INFINITY;
    }
  }
}

// hide_unseen() for a transposed S.
template <class S>
__device__ __forceinline__ void hide_unseen_transposed(S& s, const SeenByLanes<S>& of_row) {
  constexpr uint32_t kAll = (1u << S::kColumns) - 1;
  bool all = true;
#pragma unroll
  for (uint32_t own : of_row.bits) all &= own == kAll;
  if (__all_sync(~0u, all)) return;
  const int32_t lane = ptx::thread_index() % 32;
#pragma unroll
  for (int slot = 0; slot < S::kSlots; ++slot) {
    const int i = S::row_step(slot);
    const uint32_t seen = __shfl_sync(~0u, of_row.bits[i / 32], i % 32 + lane % 4 * 2) >> S::column(0);
#pragma unroll
    for (int n = 0; n < S::kColumnTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (!(seen >> S::column_step(n, e) & 1)) s.at(slot, n, e) = -INFINITY;
    }
  }
}

// The keys of S, which begin at `key`, that the ranges of row i hold; all of them if the row is not in use.
template <class S>
__device__ __forceinline__ SeenKeys seen_in_ranges(const RowRanges& ranges, const Band& band, int32_t i,
                                                   int32_t key) {
  const Interval keys{key, key + S::kColumns};
  return i < band.q_len ? ranges.seen(0, i, keys) : SeenKeys{keys, {0, 0}};
}

// S [rows from `row`, keys from `key`] ← −inf where the ranges of a row in use do not hold the key.
template <class S>
__device__ __forceinline__ void hide_outside_ranges(S& s, const RowRanges& ranges, const Band& band,
                                                    int32_t row, int32_t key) {
  const auto seen = [&](int32_t i) { return seen_in_ranges<S>(ranges, band, i, key); };
  if constexpr (S::kTransposed && S::kColumns < 32) {
    SeenByLanes<S> of_row;
    of_row.find(row, key, seen);
    hide_unseen_transposed(s, of_row);
  } else {
    hide_unseen(s, key, [&](int slot) { return seen(row + S::row(slot)); });
  }
}

}  // namespace jax_flash
