// Finds what segments and ranges leave to each tile of a grid: an interval of rows of the other side, within
// the band. It reaches from the first to the last row that may share a segment with the tile and that sees,
// or is seen by, one of its rows at some head. It is computed once for all heads, so a kernel's CTA only
// reads the interval of its tile.
#include "core/segments.h"
#include "core/visible/ranges.h"

#include "cuda/launch.h"
#include "cuda/registry.h"
#include "cuda/work.cuh"

namespace jax_flash {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

__device__ __forceinline__ SegmentSet from_lane(const SegmentSet& set, int apart) {
  return {__shfl_xor_sync(~0u, set.lo, apart), __shfl_xor_sync(~0u, set.hi, apart),
          __shfl_xor_sync(~0u, set.bits, apart)};
}

// Rows of the other side: the smallest interval that holds them, and their number.
struct Rows {
  Interval hull{INT32_MAX, 0};
  int32_t count = 0;

  __device__ __forceinline__ void add(const Rows& other) {
    hull = {min(hull.lo, other.hull.lo), max(hull.hi, other.hull.hi)};
    count += other.count;
  }
};

// Combines the rows of all threads; thread 0 gets the result.
__device__ Rows rows_of_block(Rows x) {
  __shared__ int4 of_warp[kWarps];
  for (int apart = 1; apart < 32; apart *= 2)
    x.add({{__shfl_xor_sync(~0u, x.hull.lo, apart), __shfl_xor_sync(~0u, x.hull.hi, apart)},
           __shfl_xor_sync(~0u, x.count, apart)});
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = {x.hull.lo, x.hull.hi, x.count, 0};
  __syncthreads();
  if (threadIdx.x > 0) return x;
  for (int i = 1; i < kWarps; ++i) x.add({{of_warp[i].x, of_warp[i].y}, of_warp[i].z});
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

  // The interval from the first to the last key that one of the tile's rows sees. All threads get it.
  __device__ Interval keys_of_rows() const {
    __shared__ Interval all;
    Rows own;
    for (int32_t i = begin + static_cast<int32_t>(threadIdx.x); i < end; i += kThreads) {
      const Interval keys = seen(i, band.row(i));
      if (!keys.empty()) own.add({keys, 1});
    }
    own = rows_of_block(own);
    if (threadIdx.x == 0) all = own.count == 0 ? Interval{0, 0} : own.hull;
    __syncthreads();
    return all;
  }

  // Whether query row i sees one of the tile's keys.
  __device__ bool sees_tile(int32_t i) const {
    return !seen(i, intersect(band.row(i), {begin, end})).empty();
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

// Where the results for the tiles of a grid, or for parts of them, are stored. to, one_segment: [L, batch,
// tiles].
struct SegmentTables {
  Interval* to;
  int32_t* one_segment;
  int32_t tiles, block;  // tiles of a batch entry; rows per tile
};

// One CTA per tile of a batch entry, followed by one per part.
template <Over over>
__global__ void __launch_bounds__(kThreads)
    find_segments(const __grid_constant__ Problem p, const SegmentTables tiles, const SegmentTables parts,
                  uint32_t first_part) {
  constexpr bool kQueries = over == Over::kQueries;
  const bool part = blockIdx.x >= first_part;
  const SegmentTables& found = part ? parts : tiles;
  const uint32_t number = blockIdx.x - (part ? first_part : 0);
  const int64_t entry = number / found.tiles, leading = entry / p.batch;
  const Sequence s = fixed_sequence(p, leading, static_cast<int32_t>(entry % p.batch));
  const Band band = make_band(p, leading, s);
  const int32_t begin = static_cast<int32_t>(number % found.tiles) * found.block,
                end = min(begin + found.block, kQueries ? s.q_len : s.k_len);
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
  Interval seen = kQueries ? band.rows(begin, end) : band.queries(begin, end);
  if (kQueries && of_rows) seen = ranges.keys_of_rows();
  Rows left;
  const int32_t first = seen.lo + static_cast<int32_t>(threadIdx.x);
  if (!kQueries && of_rows) {
    for (int32_t j = first; j < seen.hi; j += kThreads)
      if (segments.may_share(j) && ranges.sees_tile(j)) left.add({{j, j + 1}, 1});
  } else if (!segments.others) {
    if (threadIdx.x == 0 && !seen.empty()) left.add({seen, seen.size()});
  } else {
#pragma unroll 8
    for (int32_t j = first; j < seen.hi; j += kThreads)
      if (segments.set.may_have(segments.others[j])) left.add({{j, j + 1}, 1});
  }
  left = rows_of_block(left);
  if (threadIdx.x > 0) return;
  found.to[number] = left.count == 0 ? Interval{0, 0} : left.hull;
  found.one_segment[number] =
      !of_rows && segments.set.lo == segments.set.hi && left.count == left.hull.size();
}

template <Over over>
cudaError_t trim_grid(const Problem& p, const TileGrid& grid, void* workspace, cudaStream_t stream) {
  if (grid.segments < 0) return cudaSuccess;
  const int64_t rows = over == Over::kQueries ? p.q_rows : p.k_rows, entries = p.leading.count() * p.batch;
  char* free = static_cast<char*>(workspace) + grid.segments;
  const auto take = [&](int32_t block) {
    const int64_t tiles = ceil_div(rows, block), all = entries * tiles;
    auto* to = reinterpret_cast<Interval*>(free);
    auto* one_segment = reinterpret_cast<int32_t*>(to + all);
    free = reinterpret_cast<char*>(one_segment + all);
    return SegmentTables{to, one_segment, static_cast<int32_t>(tiles), block};
  };
  const SegmentTables tiles = take(grid.block), parts = take(kSegmentPart);
  const int64_t all = entries * tiles.tiles, all_parts = grid.segment_parts ? entries * parts.tiles : 0;
  return launch(find_segments<over>, all + all_parts, kThreads, 0, stream, p, tiles, parts,
                static_cast<uint32_t>(all));
}

}  // namespace

cudaError_t launch_segments(const Problem& p, const LaunchPlan& plan, void* workspace, cudaStream_t stream) {
  const cudaError_t e = trim_grid<Over::kQueries>(p, plan.queries, workspace, stream);
  if (e != cudaSuccess) return e;
  return trim_grid<Over::kKeys>(p, plan.keys, workspace, stream);
}

}  // namespace jax_flash
