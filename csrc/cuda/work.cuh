// The tile, the sequence and the head that a CTA works on, and the location of its operands.
#pragma once

#include <cstdint>

#include "core/band.h"
#include "core/plan/launch_plan.h"
#include "core/problem.h"
#include "core/sequence.h"
#include "core/visible/row_blocks.h"

namespace jax_flash {

enum class Over { kQueries, kKeys };

struct BlockWork {
  int64_t leading;
  int32_t head, batch_row;  // the (first) query head; the batch index of per-token operands
  TileWork tile;

  // The element offset of a row of this sequence.
  __device__ __forceinline__ int64_t offset(const Problem& p, const View& view, int32_t view_head,
                                            int64_t row) const {
    return view.leading_offset(p.leading, leading) + view.offset(batch_row, view_head, row);
  }
  __device__ __forceinline__ Sequence sequence() const {
    return {tile.index, batch_row, tile.q_begin, tile.k_begin, tile.q_len, tile.k_len};
  }
  __device__ __forceinline__ Band band(const Problem& p) const { return make_band(p, leading, sequence()); }
};

// Whether packed sequences lie in order, in each of the entries: their first rows [n + 1] never decrease and
// are within [0, rows]. Only after the last sequence that has rows may they fall, as where unused ones are 0.
// Decode, except over latent pools, reads them as they are, so that it need not wait for their running
// maximum. It leaves the sequences of calls without this order to the forward. All threads of a CTA call
// this.
__device__ inline bool in_order(const int32_t* starts, int64_t stride, int32_t n, int32_t rows,
                                int64_t entries, int64_t entry_stride) {
  if (entry_stride == 0) entries = 1;
  bool rises = true;
  for (int64_t entry = 0; entry < entries; ++entry) {
    const int32_t* const own = starts + entry * entry_stride;
    for (int64_t i = threadIdx.x; i <= n; i += blockDim.x) {
      const int32_t x = own[i * stride];
      rises &= 0 <= x && x <= (i == n ? rows : own[(i + 1) * stride]);
    }
  }
  if (__syncthreads_and(rises)) return true;
  for (int64_t entry = 0; entry < entries; ++entry) {  // each thread looks at all of them, which is rare
    const int32_t* const own = starts + entry * entry_stride;
    bool good = own[0] >= 0, falls = false;
    for (int64_t i = 0; i < n; ++i) {
      const int32_t x = own[i * stride], next = own[(i + 1) * stride];
      falls |= x > next;
      good &= x <= rows && next <= rows && !(falls && x < next);
    }
    if (!good) return false;
  }
  return true;
}

// Heads whose tiles are worked on together: few enough that their K and V stay in L2.
inline constexpr uint32_t kHeadsTogether = 16;

// The size of a group if heads are divided into groups of equal size, of at least `least` heads.
JF_HD uint32_t equal_group(uint32_t heads, uint32_t least) {
  const uint32_t groups = heads < least ? 1 : heads / least;
  return (heads + groups - 1) / groups;
}

// A tile's number among the `count` tiles of all heads.
struct TileNumber {
  uint32_t number, count;
};

// The work of a tile of packed sequences. Sequences come in the schedule's order, longest first. Within a
// sequence, one group of heads follows the other, and within a group tile follows tile, each with all heads
// of the group. A group has `heads_together` heads; if `fills_sms`, it has at least these, and about a tile
// for each SM, and ends with its short ones. Slot s of the schedule stands for numbers
// [s · heads, (s + 1) · heads).
template <Over over>
__device__ __forceinline__ BlockWork find_packed_work(const Problem& p, const TileWork* schedule,
                                                      int32_t tiles, int32_t block, TileNumber wanted,
                                                      uint32_t heads_together, bool fills_sms) {
  constexpr uint32_t kTilesTogether = 128;
  constexpr bool kQueries = over == Over::kQueries;
  const uint32_t heads = kQueries ? p.heads : p.kv_heads, all = tiles * heads;
  BlockWork work;
  work.leading = wanted.number / all;
  work.batch_row = 0;
  const uint32_t number = wanted.number % all, slot = number / heads;
  schedule += work.leading * tiles;
  work.tile = schedule[slot];
  work.head = 0;
  if (work.tile.tiles == 0) return work;
  const uint32_t first = slot - work.tile.row / block, count = work.tile.tiles;
  if (fills_sms) heads_together = equal_group(heads, max(kTilesTogether / count, heads_together));
  const uint32_t rest = number - first * heads, group = rest / (heads_together * count) * heads_together;
  const uint32_t together = min(heads_together, heads - group), of_group = rest - group * count;
  const uint32_t t = of_group / together;
  work.head = static_cast<int32_t>(group + of_group % together) * (kQueries ? 1 : p.heads / p.kv_heads);
  work.tile = schedule[first + (kQueries ? count - 1 - t : t)];
  return work;
}

// The work of the tile that begins with `row`, of a head of a batch entry in a fixed layout. `number`: the
// head's, among those of all entries.
template <Over over>
__device__ __forceinline__ BlockWork fixed_work(const Problem& p, uint32_t heads, uint32_t number,
                                                int32_t row, int32_t block) {
  constexpr bool kQueries = over == Over::kQueries;
  BlockWork work;
  work.head = static_cast<int32_t>(number % heads) * (kQueries ? 1 : p.heads / p.kv_heads);
  number /= heads;
  work.batch_row = static_cast<int32_t>(number % p.batch);
  work.leading = number / p.batch;
  const Sequence s = fixed_sequence(p, work.leading, work.batch_row);
  const int32_t rows = kQueries ? p.q_rows : p.k_rows;
  work.tile = {s.index, 0, 0, s.q_len, s.k_len, row, row + min(block, rows - row), 0};
  return work;
}

// How heads are grouped: those of a group are worked on together, few enough that what they share stays in
// L2. The last group has all heads from `last` on.
struct HeadGroups {
  uint32_t size = kHeadsTogether, last = ~0u;
};

// Which key tiles of a head come first, if not its first ones.
struct KeyTileOrder {
  bool leads = false;     // whether the first tiles of all heads come before the groups
  int32_t begin = 0;      // or: the tile that comes first; the tiles before it come last
  bool descends = false;  // or: whether the tiles come from the last to the first
};

// The work of a tile. The tiles of a group of heads have consecutive numbers. With a causal mask the longest
// come first (the last queries, the first keys), so that the last CTAs to run have short ones. kUneven: query
// tiles differ without a causal mask, too. slots: query tiles of the same rows (KeyLists), in place of heads;
// 0: heads. order: of the key tiles of a head.
template <Over over, bool kUneven = false>
__device__ __forceinline__ BlockWork find_work(const Problem& p, const TileWork* schedule, int32_t tiles,
                                               int32_t block, TileNumber wanted, HeadGroups groups = {},
                                               int32_t slots = 0, KeyTileOrder order = {}) {
  constexpr bool kQueries = over == Over::kQueries;
  if (p.packed()) {
    // In a deterministic backward tiles of one head wait for each other. Otherwise a group of key tiles has
    // few heads, so that their Q and dO stay in L2.
    const bool waits = !kQueries && p.spec.deterministic, fills_sms = !waits && p.uneven();
    const uint32_t together = waits || (kQueries && fills_sms) ? groups.size : 1;
    return find_packed_work<over>(p, schedule, tiles, block, wanted, together, fills_sms);
  }
  const uint32_t heads = slots > 0 ? slots : kQueries ? p.heads : p.kv_heads, all = wanted.count / tiles;
  // Without a causal mask query tiles are equally long, and share more K and V if the heads come one after
  // the other.
  const uint32_t group = kQueries && !kUneven && p.spec.right < 0 ? 1 : groups.size;
  int32_t tile = 0;
  uint32_t rest = wanted.number;
  if (!order.leads || wanted.number >= all) {
    const uint32_t others = tiles - order.leads, of_others = wanted.number - order.leads * all;
    const uint32_t first = min(of_others / (group * others) * group, groups.last), left = all - first;
    const uint32_t together = first < groups.last ? min(group, left) : left;
    const uint32_t number = of_others - first * others;
    const int32_t t = static_cast<int32_t>(number / together + order.leads) + order.begin;
    tile = kQueries || order.descends ? tiles - 1 - t : t < tiles ? t : t - tiles;
    rest = first + number % together;
  }
  return fixed_work<over>(p, heads, rest, tile * block, block);
}

// The work of this CTA in grids with one CTA per tile.
template <Over over>
__device__ __forceinline__ BlockWork find_work(const Problem& p, const GridTiles& tiles, int32_t block) {
  if (tiles.count == 1 && !p.packed())  // saves divisions, which short calls would feel
    return fixed_work<over>(p, over == Over::kQueries ? p.heads : p.kv_heads, blockIdx.x, 0, block);
  return find_work<over>(p, tiles.schedule, tiles.count, block, {blockIdx.x, gridDim.x});
}

// The first thread of a kernel clears the tile counter of the next one, if there is one.
__device__ __forceinline__ void clear_counter(uint32_t* counter) {
  if (counter && blockIdx.x == 0 && threadIdx.x == 0) *counter = 0;
}

// The slot of a tile in the tables that segments.cu makes for a grid of tiles of `block` rows.
template <Over over>
__device__ __forceinline__ int64_t slot_of_tile(const Problem& p, const BlockWork& work, int32_t block) {
  constexpr bool kQueries = over == Over::kQueries;
  const TileWork& tile = work.tile;
  return first_slot_of(p, work.leading, tile.index, kQueries ? tile.q_begin : tile.k_begin,
                       kQueries ? p.q_rows : p.k_rows, block) +
         tile.row / block;
}

// Whether kernels of a score take calls in which a tile's interval may have a gap.
template <class Score>
inline constexpr bool kTakesGaps = Score::reads(Operand::kRanges) || Score::reads(Operand::kMask);

// The result of launch_segments for a slot of a table.
__device__ __forceinline__ SeenByTile seen_of_slot(const Problem& p, const Interval* table, int64_t slot) {
  if (!leaves_gaps(p)) return {table[slot], {0, 0}};
  return {table[2 * slot], table[2 * slot + 1]};
}

// The part of `seen` (the rows of the other side that the band leaves to a tile) that segments, ranges and a
// mask leave. `segments`: for all tiles of the grid, from launch_segments. kGaps: whether the kernel takes
// gaps. Packed sequences may have ranges, too.
template <Over over, bool kGaps>
__device__ __forceinline__ SeenByTile trim_to_segments(const Interval* segments, int32_t tiles, int32_t block,
                                                       const Problem& p, const BlockWork& work,
                                                       Interval seen) {
  if (!segments) return {seen, {0, 0}};
  if constexpr (kGaps) {
    if (work.tile.index == kNoSequence) return {{0, 0}, {0, 0}};
    return seen_of_slot(p, segments, slot_of_tile<over>(p, work, block));
  }
  return {segments[(work.leading * p.batch + work.batch_row) * tiles + work.tile.row / block], {0, 0}};
}

// The gap between the tiles that a CTA goes through, in kernels that take ranges. Loops that load ahead use
// numbers of tiles that leave out those of the gap.
template <bool kRanges>
struct GapOfTiles {
  Interval gap;

  __device__ __forceinline__ void set_gap(const Interval& rows, int32_t block) {
    gap = {(rows.lo + block - 1) / block, rows.hi / block};
    if (gap.empty()) gap = {0, 0};
  }
  // The first tile from n on that is not in the gap.
  __device__ __forceinline__ int32_t from(int32_t n) const { return gap.contains(n) ? gap.hi : n; }
  // The numbers of these tiles if those of the gap have none.
  __device__ __forceinline__ Interval close(const Interval& tiles) const {
    const auto number = [&](int32_t n) { return n - intersect(gap, {0, n}).size(); };
    return {number(tiles.lo), number(tiles.hi)};
  }
  // The tile with number n.
  __device__ __forceinline__ int32_t tile(int32_t n) const { return n < gap.lo ? n : n + gap.hi - gap.lo; }
};
template <>
struct GapOfTiles<false> {
  __device__ __forceinline__ static void set_gap(const Interval&, int32_t) {}
  __device__ __forceinline__ static int32_t from(int32_t n) { return n; }
  __device__ __forceinline__ static Interval close(const Interval& tiles) { return tiles; }
  __device__ __forceinline__ static int32_t tile(int32_t n) { return n; }
};

}  // namespace jax_flash
