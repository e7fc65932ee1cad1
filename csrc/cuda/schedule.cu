// The varlen schedule: for each slot of the grid, which tile of which sequence it is. The device builds it
// from cu_seqlens, whose values the host does not know.
//
// The padded list consists of the tokens before the first sequence, the n sequences, and the tokens after the
// last. Its sequences are sorted so that those with the longest loops (the most rows on the other side) come
// first: thread blocks start in that order, and the last ones to run are short. Each thread places one
// sequence by counting the tiles of all sequences before it. With more than kMostSorted sequences they
// stay in their original order, and the slots of sequence z begin at first_slot(). Unused slots are empty.
#include "core/sequence.h"
#include "cuda/launch.h"
#include "cuda/ptx/dependent.cuh"
#include "cuda/registry.h"
#include "cuda/work.cuh"

namespace jax_flash {
namespace {

constexpr int kThreads = 512;
static_assert(kMostSorted + 2 <= kThreads);

// starts[i] ← the running maximum of cu_seqlens [n + 1], clamped to [0, rows]. One block scans kThreads
// values at a time.
__device__ void running_maximum(const View& cu_seqlens, int64_t offset, int32_t n, int32_t rows,
                                int32_t* starts) {
  __shared__ int32_t scan[kThreads];
  int32_t carry = 0;
  const int32_t* source = cu_seqlens.as<const int32_t>() + offset;
  for (int64_t base = 0; base <= n; base += kThreads) {
    const int64_t i = base + threadIdx.x;
    scan[threadIdx.x] = max(carry, i <= n ? clamp_index(source[i * cu_seqlens.batch], rows) : 0);
    __syncthreads();
    for (int step = 1; step < kThreads; step *= 2) {
      const int32_t before = static_cast<int>(threadIdx.x) >= step ? scan[threadIdx.x - step] : 0;
      __syncthreads();
      scan[threadIdx.x] = max(scan[threadIdx.x], before);
      __syncthreads();
    }
    if (i <= n) starts[i] = scan[threadIdx.x];
    carry = scan[kThreads - 1];
    __syncthreads();
  }
}

// The first rows of the sequences.
struct Starts {
  const int32_t* padded;  // [n + 3], of the padded list, for the rows that are tiled (queries or keys)
  const int32_t* others;  // [n + 1], of the n sequences, for the rows of the other side
  int32_t count;          // n + 2

  __device__ int32_t rows(int32_t z) const { return padded[z + 1] - padded[z]; }
};

__device__ __forceinline__ TileWork empty_entry() { return {kNoSequence, 0, 0, 0, 0, 0, 0, 0}; }

// The fields that all tiles of padded sequence z share; their row and end are set later.
template <Over over>
__device__ TileWork sequence_tiles(const Problem& p, int64_t leading, const Starts& starts, int32_t block,
                                   const DecodeGrid& decode, int32_t z) {
  constexpr bool kQueries = over == Over::kQueries;
  const int32_t begin = starts.padded[z], tiles = static_cast<int32_t>(ceil_div(starts.rows(z), block));
  if (z == 0 || z == starts.count - 1) {
    return {kNoSequence, kQueries ? begin : 0, kQueries ? 0 : begin, 0, 0, 0, 0, tiles};
  }
  const int32_t *own = starts.padded + 1, *others = starts.others;
  const Sequence s =
      p.paged() ? paged_sequence(p, leading, z - 1, own)
                : varlen_sequence(p, leading, z - 1, kQueries ? own : others, kQueries ? others : own);
  if (decode.takes(s.q_len, p.heads / p.kv_heads)) return empty_entry();
  return {s.index, s.q_begin, s.k_begin, s.q_len, s.k_len, 0, 0, tiles};
}

// first[z] ← the first slot of padded sequence z, in sorted order, and first[count] ← the number of slots in
// use. There are at most kThreads sequences.
template <Over over>
__device__ void sort_sequences(const Problem& p, int64_t leading, const Starts& starts, int32_t block,
                               const DecodeGrid& decode, int32_t* first) {
  __shared__ int32_t weights[kThreads], tiles[kThreads];
  const int32_t z = static_cast<int32_t>(threadIdx.x), n = starts.count;
  if (z < n) {
    const TileWork sequence = sequence_tiles<over>(p, leading, starts, block, decode, z);
    weights[z] = over == Over::kQueries ? sequence.k_len : sequence.q_len;
    tiles[z] = sequence.tiles;
  }
  __syncthreads();
  if (z < n) {
    int32_t before = 0, all = 0;
    for (int32_t y = 0; y < n; ++y) {
      all += tiles[y];
      if (weights[y] > weights[z] || (weights[y] == weights[z] && y < z)) before += tiles[y];
    }
    first[z] = before;
    if (z == 0) first[n] = all;
  }
  __syncthreads();
}

// in_order() for the queries of all leading entries that one launch of decode takes.
__device__ bool all_in_order(const Problem& p, int64_t leading) {
  const View& q = p.cu_seqlens_q;
  const int32_t last = p.leading.rank - 1;
  const int64_t entries = last < 0 ? 1 : p.leading.size[last];
  const int64_t first = q.leading_offset(p.leading, leading / entries * entries);
  return in_order(q.as<const int32_t>() + first, q.batch, p.batch, p.q_rows, entries,
                  last < 0 ? 0 : q.leading[last]);
}

// One thread block per leading entry. `counter`: the tile counter of the forward, which this kernel clears,
// or null.
template <Over over>
__global__ void __launch_bounds__(kThreads)
    build_schedule(const __grid_constant__ Problem p, TileWork* schedule, int32_t* starts, int64_t tiles,
                   int32_t block, DecodeGrid decode, uint32_t* counter) {
  ptx::let_next_kernel_start();
  clear_counter(counter);
  const int64_t leading = blockIdx.x;
  const int32_t n = p.batch;
  int32_t* padded = starts + leading * 2 * (n + 2);
  int32_t* others = padded + n + 3;
  int32_t* q_starts = over == Over::kQueries ? padded + 1 : others;
  int32_t* k_starts = over == Over::kQueries ? others : padded + 1;
  const View &q = p.cu_seqlens_q, &k = p.cu_seqlens_k;
  running_maximum(q, q.leading_offset(p.leading, leading), n, p.q_rows, q_starts);
  if (!p.paged()) running_maximum(k, k.leading_offset(p.leading, leading), n, p.k_rows, k_starts);
  if (threadIdx.x == 0) padded[0] = 0, padded[n + 2] = over == Over::kQueries ? p.q_rows : p.k_rows;
  __syncthreads();
  if (decode.packed_rows > 0 && !all_in_order(p, leading)) decode.packed_rows = 0;
  const Starts list{padded, others, n + 2};
  const bool sorted = n <= kMostSorted;
  __shared__ int32_t first[kThreads + 1];
  if (sorted) sort_sequences<over>(p, leading, list, block, decode, first);
  schedule += leading * tiles;
  for (int64_t slot = threadIdx.x; slot < tiles; slot += kThreads) {
    if (!sorted || slot >= first[n + 2]) schedule[slot] = empty_entry();
  }
  __syncthreads();
  // Each warp writes the tiles of one sequence after another.
  for (int32_t z = threadIdx.x / 32; z < n + 2; z += kThreads / 32) {
    TileWork tile = sequence_tiles<over>(p, leading, list, block, decode, z);
    const int64_t begin = sorted ? first[z] : first_slot(padded[z], block, z);
    for (int32_t t = threadIdx.x % 32; t < tile.tiles; t += 32) {
      tile.row = t * block, tile.end = min(tile.row + block, list.rows(z));
      schedule[begin + t] = tile;
    }
  }
}

template <Over over>
cudaError_t launch_schedule(const Problem& p, const LaunchPlan& plan, const TileGrid& grid, void* workspace,
                            cudaStream_t stream) {
  if (grid.schedule < 0) return cudaSuccess;
  const int64_t leading = p.leading.count();
  auto* schedule = reinterpret_cast<TileWork*>(static_cast<char*>(workspace) + grid.schedule);
  auto* starts = reinterpret_cast<int32_t*>(schedule + leading * grid.tiles);
  uint32_t* const counter = over == Over::kQueries ? tile_counter(plan, workspace) : nullptr;
  return launch(build_schedule<over>, leading, kThreads, 0, stream, p, schedule, starts, grid.tiles,
                grid.block, plan.decode, counter);
}

}  // namespace

cudaError_t launch_schedules(const Problem& p, const LaunchPlan& plan, void* workspace, cudaStream_t stream) {
  if (cudaError_t e = launch_schedule<Over::kQueries>(p, plan, plan.queries, workspace, stream);
      e != cudaSuccess)
    return e;
  if (cudaError_t e = launch_schedule<Over::kKeys>(p, plan, plan.keys, workspace, stream); e != cudaSuccess)
    return e;
  if (cudaError_t e = launch_ranges(p, plan, workspace, stream); e != cudaSuccess) return e;
  if (cudaError_t e = launch_blocks(p, plan, workspace, stream); e != cudaSuccess) return e;
  return launch_segments(p, plan, workspace, stream);
}

}  // namespace jax_flash
