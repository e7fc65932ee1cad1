// Finds, for each tile of a grid, the interval of rows of the other side (keys or queries) that segments,
// ranges and a boolean mask leave visible within the band. It reaches from the first to the last row that may
// share a segment with the tile and that sees, or is seen by, one of the tile's rows at some head. With
// ranges or a mask an interval may have a gap without such rows. Intervals are computed once for all heads,
// so a kernel's CTA only reads that of its tile.
#include "core/segments.h"
#include "core/visible/mask_tiles.h"
#include "core/visible/row_blocks.h"
#include "cuda/launch.h"
#include "cuda/ptx/dependent.cuh"
#include "cuda/registry.h"
#include "cuda/slots.cuh"

namespace jax_flash {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

__device__ __forceinline__ SegmentSet from_lane(const SegmentSet& set, int apart) {
  return {__shfl_xor_sync(~0u, set.lo, apart), __shfl_xor_sync(~0u, set.hi, apart),
          __shfl_xor_sync(~0u, set.bits, apart)};
}

// Rows of the other side: the smallest interval that holds them, their number and, with ranges, the keys that
// lie between the two ranges of every row that has two.
struct Rows {
  Interval hull{INT32_MAX, 0};
  int32_t count = 0;
  Interval hole{0, INT32_MAX};

  __device__ __forceinline__ void add(const Rows& other) {
    hull = {min(hull.lo, other.hull.lo), max(hull.hi, other.hull.hi)};
    count += other.count;
    hole = intersect(hole, other.hole);
  }
  __device__ __forceinline__ Rows from_lane(int apart) const {
    const auto get = [apart](int32_t x) { return __shfl_xor_sync(~0u, x, apart); };
    return {{get(hull.lo), get(hull.hi)}, get(count), {get(hole.lo), get(hole.hi)}};
  }
};

// Combines the rows of all threads; all threads get the result.
__device__ Rows rows_of_block(Rows x) {
  __shared__ Interval hulls[kWarps], holes[kWarps];
  __shared__ int32_t counts[kWarps];
  for (int apart = 1; apart < 32; apart *= 2) x.add(x.from_lane(apart));
  __syncthreads();  // all threads have read an earlier result
  const auto warp = threadIdx.x / 32;
  if (threadIdx.x % 32 == 0) hulls[warp] = x.hull, counts[warp] = x.count, holes[warp] = x.hole;
  __syncthreads();
  x = {};
  for (int i = 0; i < kWarps; ++i) x.add({hulls[i], counts[i], holes[i]});
  return x;
}

// A tile's own rows or keys, and the ranges of all query rows of its batch entry.
struct RangesOfTile {
  const Band& band;
  RowRanges ranges;
  int32_t heads, begin, end;

  // The keys among `keys` that query row i sees at one or more of the heads.
  __device__ Interval seen(int32_t i, const Interval& keys) const {
    Interval all{0, 0};
    for (int32_t h = 0; h < heads; ++h) all = hull_of(all, ranges.seen(h, i, keys).hull);
    return all;
  }

  // Calls visit() for the keys that a row of the tile sees at a head; the threads share the rows.
  template <class Visit>
  __device__ void for_rows(Visit visit) const {
    for (int32_t i = begin + static_cast<int32_t>(threadIdx.x); i < end; i += kThreads)
      for (int32_t h = 0; h < heads; ++h) {
        const SeenKeys keys = ranges.seen(h, i, band.row(i));
        if (!keys.hull.empty()) visit(keys);
      }
  }

  // The interval from the first to the last key that one of the tile's rows sees, and a gap in it that no row
  // sees. All threads get it.
  __device__ SeenByTile keys_of_rows() const {
    Rows own;
    for_rows([&](const SeenKeys& keys) {
      own.add({keys.hull, 1, keys.hole.empty() ? Interval{0, INT32_MAX} : keys.hole});
    });
    own = rows_of_block(own);
    if (own.count == 0) return {{0, 0}, {0, 0}};
    if (own.hole.hi == INT32_MAX || own.hole.empty()) return {own.hull, {0, 0}};
    Rows gap;
    gap.hole = own.hole;
    for_rows([&](const SeenKeys& keys) {
      if (keys.hole.empty()) gap.hole = shrink_gap(gap.hole, keys.hull);
    });
    gap = rows_of_block(gap);
    return {own.hull, gap.hole.empty() ? Interval{0, 0} : gap.hole};
  }

  // Whether query row i sees one of the tile's keys.
  __device__ bool sees_tile(int32_t i) const {
    return !seen(i, intersect(band.row(i), {begin, end})).empty();
  }
};

constexpr int kFlags = 2048;

// What a boolean mask shows to a tile at some head: a flag for each `unit` of the other side's rows from
// `first` on, in shared memory. Without a mask there are no flags.
struct ShownByMask {
  const uint8_t* flags = nullptr;
  int32_t first = 0, unit = 1;

  __device__ bool shows(int32_t j) const { return !flags || flags[(j - first) / unit]; }

  // `tiles`: of the mask's first head; `own`, `others`: rows of the tile's side and of the other one.
  template <Over over>
  __device__ static ShownByMask find(uint8_t* flags, const MaskTiles& tiles, int32_t heads,
                                     const Interval& own, const Interval& others) {
    const Interval all = tiles_of(others, kRowBlock);
    const int32_t tiles_of_flag = all.size() / kFlags + 1;
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i * tiles_of_flag < all.size(); i += kThreads) {
      const int32_t first = all.lo + i * tiles_of_flag, end = min(first + tiles_of_flag, all.hi);
      const Interval part{first * kRowBlock, end * kRowBlock};
      bool shown = false;
      for (int32_t h = 0; h < heads && !shown; ++h)
        shown = (over == Over::kQueries ? tiles.seen_of(h, own, part) : tiles.seen_of(h, part, own)) !=
                SeenPiece::kNone;
      flags[i] = shown;
    }
    __syncthreads();
    return {flags, all.lo * kRowBlock, tiles_of_flag * kRowBlock};
  }
};

// Which rows of the other side a tile sees, or is seen by: a flag for each `unit` of `rows`, in shared
// memory.
struct SeeingRows {
  uint8_t* flags;
  Interval rows;
  int32_t unit;

  __device__ SeeingRows(uint8_t* shared, const Interval& of)
      : flags(shared), rows(of), unit(max(kRowBlock, of.size() / kFlags + 1)) {
    const int64_t used =
        min(int64_t{kFlags}, ceil_div(ceil_div(of.size(), unit), 32) * 32);  // gap() reads 32
    for (int i = static_cast<int>(threadIdx.x); i < used; i += kThreads) flags[i] = 0;
    __syncthreads();
  }
  __device__ void add(int32_t i) const { flags[(i - rows.lo) / unit] = 1; }
  // The longest gap between these rows. A whole warp calls it after all threads have added theirs.
  __device__ Interval gap() const {
    SeenByQueries found;
    for (int32_t i = 0; int64_t{i} * unit < rows.size(); i += 32) {
      const int32_t own = i + static_cast<int32_t>(threadIdx.x);
      found.add(__ballot_sync(~0u, own < kFlags && flags[own]), i);
    }
    return {rows.lo + found.gap.lo * unit, rows.lo + found.gap.hi * unit};
  }
};

// The segments of a tile, compared with those of the other side.
struct SegmentsOfTile {
  SegmentSet set;  // every warp has it
  const int32_t* others = nullptr;

  // Adds the segments of own[begin, end).
  __device__ void add(const int32_t* own, int32_t begin, int32_t end) {
    for (int32_t i = begin + static_cast<int32_t>(threadIdx.x % 32); i < end; i += 32) set.add(own[i]);
    for (int apart = 1; apart < 32; apart *= 2) set.add(from_lane(set, apart));
  }
  __device__ bool may_share(int32_t j) const { return !others || set.may_have(others[j]); }
};

// Where the results for the tiles of a grid, or for parts of them, are stored, by slot.
struct SegmentTables {
  Interval* to;  // with ranges an interval and its gap for each slot
  int32_t* one_segment;
  Slots slots;
};

// One CTA per slot of a tile, followed by one per slot of a part. `counter`: the tile counter of the next
// kernel, which this kernel clears, or null. `mask`: the tiles of a boolean mask, if the plan classifies
// them.
template <Over over>
__global__ void __launch_bounds__(kThreads)
    find_segments(const __grid_constant__ Problem p, const SequenceStarts starts, const SegmentTables tiles,
                  const SegmentTables parts, uint32_t first_part, const __grid_constant__ MaskTiles mask,
                  uint32_t* counter) {
  ptx::let_next_kernel_start();
  clear_counter(counter);
  constexpr bool kQueries = over == Over::kQueries;
  const bool part = blockIdx.x >= first_part;
  const SegmentTables& found = part ? parts : tiles;
  const uint32_t number = blockIdx.x - (part ? first_part : 0);
  const SlotRows at = starts.rows_of_slot<over>(p, found.slots, number);
  if (at.row < 0) return;  // the slot belongs to no sequence
  const int64_t leading = at.leading;
  const Sequence s = starts.sequence(p, leading, at.index);
  const Band band = make_band(p, leading, s);
  const int32_t begin = at.row, end = min(begin + found.slots.block, kQueries ? s.q_len : s.k_len);
  const auto segments_of = [&](const View& view) {
    return view.as<const int32_t>() + view.leading_offset(p.leading, leading) + s.index * view.batch;
  };
  SegmentsOfTile segments;
  if (p.q_segment_ids) {
    segments.add(segments_of(kQueries ? p.q_segment_ids : p.kv_segment_ids), begin, end);
    segments.others = segments_of(kQueries ? p.kv_segment_ids : p.q_segment_ids);
  }
  const RowRanges of_rows = row_ranges(p, leading, s, 0);
  const RangesOfTile ranges{band, of_rows, of_rows.head != 0 ? p.heads : 1, begin, end};
  SeenByTile in_ranges{};
  if (kQueries && of_rows) in_ranges = ranges.keys_of_rows();
  const Interval seen = !kQueries ? band.queries(begin, end)
                        : of_rows ? in_ranges.any
                                  : band.rows(begin, end);
  ShownByMask shown;
  if (mask.seen) {
    __shared__ uint8_t of_mask[kFlags];
    shown = ShownByMask::find<over>(of_mask, mask.at(leading, s.index, 0), mask.head ? p.heads : 1,
                                    {begin, end}, seen);
  }
  Rows left;
  const int32_t first = seen.lo + static_cast<int32_t>(threadIdx.x);
  if (shown.flags || (!kQueries && of_rows)) {
    __shared__ uint8_t flags[kFlags];
    const SeeingRows rows(flags, seen);
    for (int32_t j = first; j < seen.hi; j += kThreads)
      if (segments.may_share(j) && shown.shows(j) && (kQueries || !of_rows || ranges.sees_tile(j)))
        left.add({{j, j + 1}, 1}), rows.add(j);
    __syncthreads();
    const Interval gap = threadIdx.x < 32 ? rows.gap() : Interval{0, 0};
    if (gap.size() > in_ranges.gap.size()) in_ranges.gap = gap;
  } else if (!segments.others) {
    if (threadIdx.x == 0 && !seen.empty()) left.add({seen, seen.size()});
  } else {
#pragma unroll 8
    for (int32_t j = first; j < seen.hi; j += kThreads)
      if (segments.set.may_have(segments.others[j])) left.add({{j, j + 1}, 1});
  }
  left = rows_of_block(left);
  if (threadIdx.x > 0) return;
  const Interval any = left.count == 0 ? Interval{0, 0} : left.hull;
  if (leaves_gaps(p)) {
    found.to[2 * number] = any, found.to[2 * number + 1] = in_ranges.gap;
  } else {
    found.to[number] = any;
  }
  found.one_segment[number] =
      !of_rows && segments.set.lo == segments.set.hi && left.count == left.hull.size();
}

template <Over over>
cudaError_t trim_grid(const Problem& p, const TileGrid& grid, uint32_t* counter, void* workspace,
                      cudaStream_t stream) {
  if (grid.segments < 0 || p.batch == 0) return cudaSuccess;
  const int32_t rows = over == Over::kQueries ? p.q_rows : p.k_rows;
  char* free = static_cast<char*>(workspace) + grid.segments;
  const auto take = [&](int32_t block) {
    const int64_t all = segment_slots(p, rows, block);
    auto* to = reinterpret_cast<Interval*>(free);
    auto* one_segment = reinterpret_cast<int32_t*>(to + intervals_of_slot(p.spec) * all);
    free = reinterpret_cast<char*>(one_segment + all);
    return SegmentTables{to, one_segment, Slots(p, rows, block)};
  };
  const SegmentTables tiles = take(grid.block), parts = take(kSegmentPart);
  const int64_t all = segment_slots(p, rows, grid.block),
                all_parts = grid.segment_parts ? segment_slots(p, rows, kSegmentPart) : 0;
  return launch(find_segments<over>, all + all_parts, kThreads, 0, stream, p,
                starts_of(p, grid, over, workspace), tiles, parts, static_cast<uint32_t>(all),
                mask_tiles(p, grid, workspace), counter);
}

}  // namespace

cudaError_t launch_segments(const Problem& p, const LaunchPlan& plan, void* workspace, cudaStream_t stream) {
  const cudaError_t e =
      trim_grid<Over::kQueries>(p, plan.queries, tile_counter(plan, workspace), workspace, stream);
  if (e != cudaSuccess) return e;
  return trim_grid<Over::kKeys>(p, plan.keys, nullptr, workspace, stream);
}

}  // namespace jax_flash
