// The float32 sums of dQ: [entries, h, query tiles, M · d]. An entry is a leading entry or, in fixed layouts,
// a batch entry of one. Each packed sequence begins a new tile (first_slot).
//
// A tile is [M / R, d / 8, R / 16, 128] for R = kSumRows. A block of 128 is 16 rows × 8 columns as mma and
// wgmma leave them in a warp's registers (ptx::add_fragment), so an instruction of a warp adds to contiguous
// memory, and if R = 64 a consumer warpgroup's columns of 64 rows are contiguous, so TMA adds them at once.
#pragma once

#include <algorithm>

#include "core/families/hopper_layout.h"
#include "core/plan/workspace.h"
#include "core/problem.h"
#include "core/sequence.h"
#include "cuda/launch.h"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/ptx/reduce.cuh"
#include "cuda/registry.h"
#include "cuda/tile/accumulator.cuh"
#include "cuda/work.cuh"

// The order of a block of 128 depends on the architecture that is compiled for. The namespace keeps the
// conversions of different architectures apart.
namespace jax_flash::inline JF_ARCH_NAMESPACE {

inline constexpr int kSumColumns = 8;
template <int kM>
inline constexpr int kSumRows = std::min<int>(kM & -kM, hopper::kConsumerRows);  // a power of two divides kM

struct QuerySums {
  float* data;    // null: another kernel computes dQ, or one CTA has all keys
  int32_t tiles;  // query tiles per head

  // The number of the first tile of a sequence and its head.
  template <int kM>
  __device__ __forceinline__ int64_t first_tile(const Problem& p, const BlockWork& work) const {
    const int64_t entry = work.leading * (p.packed() ? 1 : p.batch) + work.batch_row;
    const int64_t first = p.packed() ? first_slot(work.tile.q_begin, kM, work.tile.index) : 0;
    return (entry * p.heads + work.head) * tiles + first;
  }
};

// The start of tile `number`, counted from the tile at `first`.
template <int kM>
__device__ __forceinline__ float* sum_tile(const Problem& p, float* first, int64_t number) {
  return first + number * (kM * p.head_dim);
}

// The offset in a tile of the sums of rows [row, row + 16) and of the columns from `column`, a multiple of 8,
// on.
template <int kM>
__device__ __forceinline__ int32_t sum_offset(int32_t head_dim, int32_t row, int32_t column) {
  const int32_t in_part = row & (kSumRows<kM> - 1);
  return (row - in_part) * head_dim + column * kSumRows<kM> + in_part * kSumColumns;
}

// Whether the first key tile of a head stores dQ, and those after it, which wait for it, add to it. Then the
// sums need no zeros, except those of query tiles that see no key. Without a window, rows that see a key see
// that of the first tile. Segments, ranges and masks may hide it, and packed sequences may have no key.
JF_HD bool first_tile_stores(const Problem& p) {
  return p.spec.deterministic && !p.packed() && p.spec.left < 0 && !p.spec.moves_band() && !p.q_segment_ids &&
         !p.ranges && !p.mask && !p.block_mask;
}

// tile += dQ, from a warp's registers. kAll: all columns are in use; kStores: tile = dQ.
template <int kM, bool kAll = false, bool kStores = false, class DQ>
__device__ __forceinline__ void add_to_sums(float* tile, int32_t head_dim, const DQ& dq, Placement at) {
  static_assert(16 * DQ::kRowTiles <= kSumRows<kM>);
  const auto lane = static_cast<uint32_t>(ptx::thread_index()) % 32;
  float* const to = tile + sum_offset<kM>(head_dim, at.row, at.column);
#pragma unroll
  for (int n = 0; n < DQ::kColumnTiles; ++n) {
    const int column = n / 2 * at.column_step + n % 2 * kSumColumns;
    if (!kAll && column >= head_dim - at.column) continue;
#pragma unroll
    for (int m = 0; m < DQ::kRowTiles; ++m) {
      float* const block = to + sum_offset<kM>(0, m * at.row_step, column);
      if constexpr (kStores) {
        ptx::store_fragment(block, lane, dq.x[m][n]);
      } else {
        ptx::add_fragment(block, lane, dq.x[m][n]);
      }
    }
  }
}

// The query rows of a sequence; of packed ones the mean.
inline int64_t mean_queries(const Problem& p) {
  return p.packed() ? p.q_rows / std::max(p.batch, 1) : p.q_rows;
}

inline int64_t sum_entries(const Problem& p) { return p.leading.count() * (p.packed() ? 1 : p.batch); }

template <int kM>
QuerySums query_sums(const Problem& p, const LaunchPlan& plan, void* workspace) {
  static_assert(kSmallestTile <= kM && (kLargestQueryTile % kM == 0 || kM == hopper::k96Queries));
  const auto tiles = static_cast<int32_t>(dq_tiles(p.spec, p.q_rows, p.batch, kM).value());
  if (plan.dq_sums < 0) return {nullptr, tiles};
  return {reinterpret_cast<float*>(static_cast<char*>(workspace) + plan.dq_sums), tiles};
}

// Clears the sums of dQ, unless the kernel does or needs no zeros, and the tile counter and the tickets,
// which lie before them.
template <int kM>
cudaError_t clear_sums(const Problem& p, const LaunchPlan& plan, void* workspace, const QuerySums& sums,
                       cudaStream_t stream) {
  if (plan.dq_sums < 0) return cudaSuccess;
  int64_t begin = plan.dq_sums, end = plan.dq_sums;
  for (int64_t counters : {plan.tile_counter, plan.dq_tickets})
    if (counters >= 0) begin = std::min(begin, counters);
  if (plan.dq_rounding == DqRounding::kKernel && !first_tile_stores(p))
    end += sum_entries(p) * p.heads * sums.tiles * kM * p.head_dim * int64_t{sizeof(float)};
  if (begin == end) return cudaSuccess;
  return cudaMemsetAsync(static_cast<char*>(workspace) + begin, 0, end - begin, stream);
}

// The first query rows of packed sequences, [n + 1] for each entry with a stride of 2 · (n + 2), in the
// schedule of the keys; null if there is no key.
inline const int32_t* query_starts_of_keys(const Problem& p, const TileGrid& keys, const void* workspace) {
  const TileWork* schedule = schedule_of(keys, workspace);
  if (!schedule) return nullptr;
  return reinterpret_cast<const int32_t*>(schedule + p.leading.count() * keys.tiles) + p.batch + 3;
}

inline constexpr int kSumThreads = 256, kOutsideBlocks = 16;

// Zeros the packed rows of `to` [q_rows, h, d] that lie outside all sequences: the share of block `block` of
// kOutsideBlocks.
template <class T>
__device__ void clear_outside(const Problem& p, T* to, const int32_t* starts, uint32_t block) {
  const int64_t row = int64_t{p.heads} * p.head_dim / kChunk<T>, before = starts[0] * row;
  const int64_t after = starts[p.batch] * row, end = p.q_rows * row;
  auto* const chunks = reinterpret_cast<uint4*>(to);
  constexpr int kStep = kOutsideBlocks * kSumThreads;
  const int64_t first = block * kSumThreads + threadIdx.x;
  for (int64_t i = first; i < before; i += kStep) chunks[i] = uint4{};
  for (int64_t i = after + first; i < end; i += kStep) chunks[i] = uint4{};
}

// The query rows of a tile of sums, and the entry of dQ [q_rows, h, d] that they belong to.
template <class T>
struct SumRows {
  T* to;
  int64_t first, used, end;  // rows from `used` on are 0, and those from `end` on another tile's
  int32_t head;
};

// Rows of dQ = scale · sums, rounded, by some `threads` threads. Each has 8 columns of rows r and r + 8 at a
// time.
template <class T, int kM>
__device__ __forceinline__ void round_tile(const Problem& p, const float* from, const SumRows<T>& rows,
                                           int thread, int threads) {
  const int columns = p.head_dim / kSumColumns;
  for (int unit = thread; unit < kM / 16 * columns * 8; unit += threads) {
    const int r = unit % 8, column = unit / 8 % columns * kSumColumns, block = unit / 8 / columns * 16;
    if (rows.first + block + r >= rows.end) continue;
    float x[4][4];
    ptx::load_fragments(x, from + sum_offset<kM>(p.head_dim, block, column), r);
    const auto store = [&](int64_t i, int e) {
      if (i >= rows.end) return;
      alignas(16) T rounded[kSumColumns];
#pragma unroll
      for (int t = 0; t < 4; ++t)
        ptx::store_pair(rounded + 2 * t, i < rows.used ? x[t][e] * p.spec.scale : 0,
                        i < rows.used ? x[t][e + 1] * p.spec.scale : 0);
      auto* const out = reinterpret_cast<uint4*>(rows.to + (i * p.heads + rows.head) * p.head_dim + column);
#pragma unroll
      for (int chunk = 0; chunk < kSumColumns / kChunk<T>; ++chunk)
        out[chunk] = reinterpret_cast<const uint4*>(rounded)[chunk];
    };
    store(rows.first + block + r, 0);
    store(rows.first + block + r + 8, 2);
  }
}

// dQ [entries, q_rows, h, d] = scale · sums, rounded; 0 in rows past a length. A block converts a query tile
// of a head. If rows are packed, the last kOutsideBlocks blocks of an entry zero the rows outside all
// sequences. starts: those of packed queries, else null.
template <class T, int kM>
__global__ void __launch_bounds__(kSumThreads)
    convert_tiles(const __grid_constant__ Problem p, const __grid_constant__ QuerySums sums,
                  const int32_t* starts) {
  const uint32_t tiles = sums.tiles, all = tiles * p.heads, blocks = all + (starts ? kOutsideBlocks : 0);
  const int64_t entry = blockIdx.x / blocks;
  const uint32_t in_entry = blockIdx.x % blocks;
  T* const to = p.dquery.as<T>() + entry * p.q_rows * p.heads * p.head_dim;
  if (starts) starts += entry * 2 * (p.batch + 2);
  if (in_entry >= all) return clear_outside(p, to, starts, in_entry - all);
  const uint32_t tile = in_entry % tiles, head = in_entry / tiles;
  SumRows<T> rows{to, int64_t{tile} * kM, 0, p.q_rows, static_cast<int32_t>(head)};
  if (starts) {
    if (p.batch == 0 || tile < first_slot(starts[0], kM, 0)) return;
    const int32_t z = sequence_of_slot(starts, p.batch, kM, tile);
    rows.first = starts[z] + (tile - first_slot(starts[z], kM, z)) * kM, rows.used = rows.end = starts[z + 1];
  } else {
    const Sequence s = fixed_sequence(p, entry / p.batch, static_cast<int32_t>(entry % p.batch));
    const auto first = static_cast<int32_t>(rows.first);
    const bool stored = !first_tile_stores(p) || !make_band(p.spec, s).rows(first, first + kM).empty();
    rows.used = stored ? s.q_len : 0;
  }
  const float* const from = sums.data + ((entry * p.heads + head) * tiles + tile) * kM * p.head_dim;
  round_tile<T, kM>(p, from, rows, static_cast<int>(threadIdx.x), kSumThreads);
}

// dQ = scale · sums, rounded to T.
template <class T, int kM>
cudaError_t convert_sums(const Problem& p, const QuerySums& sums, const TileGrid& keys, const void* workspace,
                         cudaStream_t stream) {
  const int32_t* const starts = p.packed() ? query_starts_of_keys(p, keys, workspace) : nullptr;
  const int64_t elements = sum_entries(p) * p.q_rows * p.heads * p.head_dim;
  if (p.packed() && !starts) return cudaMemsetAsync(p.dquery.as<T>(), 0, elements * sizeof(T), stream);
  const int64_t blocks = int64_t{sums.tiles} * p.heads + (starts ? kOutsideBlocks : 0);
  return launch(convert_tiles<T, kM>, sum_entries(p) * blocks, kSumThreads, 0, stream, p, sums, starts);
}

}  // namespace jax_flash::inline JF_ARCH_NAMESPACE
