// Finds the keys that ranges leave visible to blocks of query rows and to tiles. Kernels of score kind Ranges
// use this to skip tiles.
#include "core/visible/row_blocks.h"
#include "cuda/launch.h"
#include "cuda/ptx/dependent.cuh"
#include "cuda/registry.h"
#include "cuda/slots.cuh"

namespace jax_flash {
namespace {

constexpr int kMostWarps = 4;

__device__ __forceinline__ int32_t lane() { return static_cast<int32_t>(threadIdx.x % 32); }

__device__ __forceinline__ Interval from_lane(Interval x, int apart) {
  return {__shfl_xor_sync(~0u, x.lo, apart), __shfl_xor_sync(~0u, x.hi, apart)};
}

// Combines the limits of all lanes.
__device__ LimitsOfRows limits_of_warp(LimitsOfRows x) {
  for (int apart = 1; apart < 32; apart *= 2)
    x.add({from_lane(x.any, apart), from_lane(x.all, apart), from_lane(x.hole, apart),
           __shfl_xor_sync(~0u, x.first_end, apart), __shfl_xor_sync(~0u, x.last_begin, apart)});
  return x;
}
__device__ Interval intersection_of_warp(Interval x) {
  for (int apart = 1; apart < 32; apart *= 2) x = intersect(x, from_lane(x, apart));
  return x;
}

// The keys that the rows of a warp's block see, in any head if heads have different ranges. The block begins
// at `row`.
__device__ SeenByBlock seen_by_block(const Problem& p, int64_t leading, const Sequence& s, int32_t row) {
  const Band band = make_band(p, leading, s);
  const RowRanges ranges = row_ranges(p, leading, s, 0);
  const int32_t heads = ranges.head != 0 ? p.heads : 1, end = min(row + kRowBlock, s.q_len);
  const auto for_rows = [&](auto visit) {
    for (int32_t h = 0; h < heads; ++h)
      for (int32_t i = row + lane(); i < end; i += 32) visit(ranges.seen(h, i, band.row(i)));
  };
  LimitsOfRows limits;
  for_rows([&](const SeenKeys& seen) { limits.add(seen); });
  limits = limits_of_warp(limits);
  Interval gap{0, 0};
  if (limits.have_hole()) {
    gap = limits.hole;
    for_rows([&](const SeenKeys& seen) {
      if (seen.hole.empty()) gap = shrink_gap(gap, seen.hull);
    });
    gap = intersection_of_warp(gap);
  }
  return limits.seen(gap);
}

// Likewise for a tile of several blocks.
__device__ SeenByTile seen_by_tile(const SeenByBlock* blocks, int32_t count) {
  SeenByTile tile{{0, 0}, {0, INT32_MAX}};
  for (int32_t i = 0; i < count; ++i) {
    tile.any = hull_of(tile.any, blocks[i].any);
    if (!blocks[i].gap.empty()) tile.gap = intersect(tile.gap, blocks[i].gap);
  }
  if (tile.gap.hi == INT32_MAX) tile.gap = {0, 0};
  for (int32_t i = 0; i < count; ++i)
    if (blocks[i].gap.empty()) tile.gap = shrink_gap(tile.gap, blocks[i].any);
  if (tile.gap.empty()) tile.gap = {0, 0};
  return tile;
}

// A CTA handles a tile of query rows, and each warp one block of the tile. `tiles`: null if only blocks are
// needed. `counter`: the tile counter of the next kernel, which this kernel clears, or null.
__global__ void __launch_bounds__(32 * kMostWarps)
    find_seen_keys(const __grid_constant__ Problem p, const SequenceStarts starts, const Slots slots,
                   SeenByBlock* blocks, SeenByTile* tiles, uint32_t* counter) {
  ptx::let_next_kernel_start();
  clear_counter(counter);
  __shared__ SeenByBlock of_warp[kMostWarps];
  const auto warp = static_cast<int32_t>(threadIdx.x / 32);
  const SlotRows at = starts.rows_of_slot<Over::kQueries>(p, slots, blockIdx.x);
  const Sequence s = starts.sequence(p, at.leading, at.index);
  const int32_t rows = p.packed() ? s.q_len : p.q_rows, row = at.row + warp * kRowBlock;
  if (at.row < 0 || at.row >= rows) return;  // the slot belongs to no sequence
  const SeenByBlock seen = seen_by_block(p, at.leading, s, row);
  if (lane() == 0) {
    of_warp[warp] = seen;
    if (row < rows)
      blocks[first_slot_of(p, at.leading, at.index, s.q_begin, p.q_rows, kRowBlock) + row / kRowBlock] = seen;
  }
  __syncthreads();
  if (threadIdx.x == 0 && tiles) tiles[blockIdx.x] = seen_by_tile(of_warp, slots.block / kRowBlock);
}

// A warp handles a key tile. `rows`: the query rows from the first to the last query tile that sees it;
// `gaps`: the query tiles between these that do not.
__global__ void __launch_bounds__(32)
    find_seeing_queries(const __grid_constant__ Problem p, const SequenceStarts starts, const Slots slots,
                        const SeenByBlock* blocks, int32_t query_tile, Interval* rows, Interval* gaps) {
  const SlotRows at = starts.rows_of_slot<Over::kKeys>(p, slots, blockIdx.x);
  ptx::wait_for_kernel_before();  // it finds `blocks`
  if (at.row < 0) return;
  const Sequence s = starts.sequence(p, at.leading, at.index);
  const Interval keys{at.row, min(at.row + slots.block, s.k_len)};
  const int64_t first_block = first_slot_of(p, at.leading, at.index, s.q_begin, p.q_rows, kRowBlock);
  SeenByQueries found;
  if (!keys.empty()) {
    const auto tiles = static_cast<int32_t>(ceil_div(s.q_len, query_tile));
    for (int32_t t = 0; t < tiles; t += 32) {
      bool seen = false;
      const int32_t row = (t + lane()) * query_tile;
      for (int32_t i = row; i < min(row + query_tile, s.q_len); i += kRowBlock) {
        const SeenByBlock& block = blocks[first_block + i / kRowBlock];
        const Interval own = intersect(block.any, keys);
        seen |= !own.empty() && !(block.gap.lo <= own.lo && own.hi <= block.gap.hi);
      }
      found.add(__ballot_sync(~0u, seen), t);
    }
  }
  if (threadIdx.x > 0) return;
  rows[blockIdx.x] = {found.any.lo * query_tile, found.any.hi * query_tile};
  gaps[blockIdx.x] = found.gap;
}

}  // namespace

cudaError_t launch_ranges(const Problem& p, const LaunchPlan& plan, void* workspace, cudaStream_t stream) {
  const bool forward = plan.queries.ranges >= 0;
  const TileGrid& grid = forward ? plan.queries : plan.keys;
  if (grid.ranges < 0 || p.batch == 0) return cudaSuccess;
  const RangeTables tables = range_tables(p, grid, workspace);
  const SequenceStarts starts = starts_of(p, grid, forward ? Over::kQueries : Over::kKeys, workspace);
  const Slots queries(p, p.q_rows, forward ? grid.block : kMostWarps * kRowBlock);
  const int64_t leading = p.leading.count();
  const cudaError_t e = launch(find_seen_keys, leading * queries.count, 32 * queries.block / kRowBlock, 0,
                               stream, p, starts, queries, tables.blocks, forward ? tables.tiles : nullptr,
                               forward ? tile_counter(plan, workspace) : nullptr);
  if (forward || e != cudaSuccess) return e;
  const Slots keys(p, p.k_rows, grid.block);
  return launch_early(true, find_seeing_queries, 1, leading * keys.count, 32, 0, stream, p, starts, keys,
                      tables.blocks, grid.other_block, tables.rows, tables.gaps);
}

}  // namespace jax_flash
