// The load warps of the kernels of latent pools: Q, and K from its pages, by cp.async. Pages of any size and
// rows of any stride are loaded alike, 16 bytes at a time; contiguous keys are one page for each sequence. L2
// evicts pools that exceed it first; without this hint, reading such a pool takes a sixth longer.
#pragma once

#include <cstdint>

#include "core/paging.h"
#include "cuda/decode/latent_state.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/dependent.cuh"

namespace jax_flash::decode {

// The last C::kLoadWarps warps of the CTA. Each loads an equal share of a tile's rows, and each instruction
// of a warp loads 128 bytes of 4 rows.
template <class C>
class LatentLoader {
 public:
  using T = typename C::Element;
  using Tile = typename C::KTile;
  static_assert(Tile::kColumns == C::QTile::kColumns && Tile::kPanel == C::QTile::kPanel);

  __device__ __forceinline__ LatentLoader(const LatentCall& decode, typename C::Shared& memory,
                                          const typename C::Column& of_column, const Partition& of_ranges,
                                          const Range& range, int32_t range_number)
      : call(decode),
        shared(memory),
        column(of_column),
        partition(of_ranges),
        number(range_number),
        policy(ptx::l2_policy(decode.evicts_first)),
        ahead(range) {
    const int thread = static_cast<int>(threadIdx.x) - (C::kThreads - C::kLoadWarps * 32);
    warp = thread / 32, row = thread % 32 / Tile::kPanel, chunk = thread % Tile::kPanel;
    chunks = max(0, (call.head_dim - chunk * kChunk<T> + kPanelColumns - 1) / kPanelColumns);
  }

  __device__ __forceinline__ void run() {
    uint32_t segment = 0, use = 0;
#pragma unroll 1
    for (; !ahead.done(); ++segment) {
      const Queries queries = open(segment);
      const int32_t tile = ahead.tile, tile_end = ahead.tile_end;
      look_up(seen_tile(tile));
      ListedTile following = seen_tile(tile + 1);  // read one tile before its pages are looked up
#pragma unroll 1
      for (int32_t n = tile; n < tile_end; ++n, ++use) {
        shared.k_pipe.wait_empty(use);
        load_keys(use);
        if (n + 1 < tile_end) look_up(following), following = seen_tile(n + 2);
        if (n == tile) load_queries(queries, segment);
      }
      ahead.advance();
    }
    shared.q_pipe.wait_empty(segment);
    if (is_first()) shared.segments[segment % C::Shared::kSegments].done = 1;
    publish(shared.q_pipe.full_barrier(segment));
  }

 private:
  static constexpr int kWarpRows = C::Shared::kWarpKeys, kStep = 32 / Tile::kPanel;
  static constexpr int kRowsOfThread = kWarpRows / kStep, kPanels = Tile::kChunks / Tile::kPanel,
                       kPanelColumns = Tile::kPanel * kChunk<T>;
  static constexpr int kWarpQueries = C::kRows / C::kLoadWarps;
  static_assert(kRowsOfThread * kStep == kWarpRows && kWarpQueries % kStep == 0);
  static_assert(Tile::kChunks % Tile::kPanel == 0);

  __device__ __forceinline__ bool is_first() const { return warp == 0 && threadIdx.x % 32 == 0; }

  // Arrives at a full barrier when this thread's copies are complete and its warp's stores are done.
  __device__ __forceinline__ void publish(uint32_t barrier) const {
    ptx::barrier_arrive_after_copies(barrier);
    ptx::barrier_arrive_by_warp(barrier);
  }

  // The queries of a segment, kept during its loop over key tiles.
  struct Queries {
    ColumnRows rows;
    int32_t leading, batch_row, q_begin;
  };

  // Opens the next segment and stores it. It replaces the third segment before it, which the consumers have
  // finished, because this thread has waited until they took the segment after that one.
  __device__ __forceinline__ Queries open(uint32_t segment) {
    const SequenceWork work = ahead.open(call, column);
    const auto entry = column.entry(ahead.index);
    keys = work.keys;
    pool = call.key.at<const T>(work.leading, call.paged ? 0 : work.index, column.kv_head, 0);
    table = call.paged ? call.block_tables.at<const int32_t>(work.leading, work.index, 0, 0) : nullptr;
    list = work.list;
    if (is_first()) {
      const Parts parts = Parts::of(call.grid, partition, ahead, number);
      shared.segments[segment % C::Shared::kSegments] = {
          work, parts, entry.first, entry.end, ahead.tile, ahead.tile_end, 0};
      note_split<C::kRows>(call, parts, ahead.index, column.kv_head);
    }
    return {column.rows(entry), work.leading, work.batch_row, work.q_begin};
  }

  __device__ __forceinline__ ListedTile seen_tile(int32_t n) const {
    return listed_tile<C::kTile, C::Column::kSkips>(call, list, n);
  }

  // Looks up the pages of this thread's keys in a tile. load_keys() checks the entries later, so that nobody
  // waits for them here.
  __device__ __forceinline__ void look_up(ListedTile tile) {
    const bool hidden = C::Column::kSkips && tile.part<C::kLoadWarps>(warp) == SeenPiece::kNone;
#pragma unroll
    for (int i = 0; i < kRowsOfThread; ++i) {
      const int64_t key = int64_t{tile.number} * C::kTile + warp * kWarpRows + row + i * kStep;
      slot[i] = kUnused;
      if (hidden || key < keys.lo || key >= keys.hi) continue;
      const int32_t entry = call.page_size.quotient(static_cast<int32_t>(key));
      slot[i] = static_cast<int32_t>(key) - entry * call.page_size.value;
      page[i] = table ? table[entry] : 0;
    }
  }

  // Copies a row of a tile if it is used; otherwise, and past the operand's columns, it becomes zeros.
  template <class To>
  __device__ __forceinline__ void copy_row(uint32_t tile, int at, const T* from, bool used) const {
    const uint32_t to = tile + To::offset(at, chunk);
    const T* const source = from + chunk * kChunk<T>;
    const int existing = used ? chunks : 0;
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel)
      ptx::cp_async_16(to + To::panel_offset(panel * To::kPanel), source + panel * kPanelColumns,
                       panel < existing, policy);
  }

  __device__ __forceinline__ void load_keys(uint32_t use) const {
    const uint32_t tile = ptx::shared_address(shared.k[use % C::kStages]);
    bool outside = false;
#pragma unroll
    for (int i = 0; i < kRowsOfThread; ++i) {
      const bool inside = is_inside(i);
      outside |= is_outside(i);
      const int64_t offset = inside ? page[i] * call.key.batch + slot[i] * call.key.row : 0;
      copy_row<Tile>(tile, warp * kWarpRows + row + i * kStep, pool + offset, inside);
    }
    const uint32_t missing = __any_sync(~0u, outside) ? missing_rows() : 0;
    if (threadIdx.x % 32 == 0) shared.missing[use % C::kStages][warp] = missing;
    publish(shared.k_pipe.full_barrier(use));
  }

  __device__ __forceinline__ bool is_inside(int i) const {
    return slot[i] != kUnused && static_cast<uint32_t>(page[i]) < static_cast<uint32_t>(call.pages);
  }
  __device__ __forceinline__ bool is_outside(int i) const { return slot[i] != kUnused && !is_inside(i); }
  // A bit for each of the warp's rows whose key is on a page outside the pool.
  __device__ __forceinline__ uint32_t missing_rows() const {
    uint32_t missing = 0;
#pragma unroll
    for (int i = 0; i < kRowsOfThread; ++i) {
      const uint32_t votes = __ballot_sync(~0u, is_outside(i) && chunk == 0);  // lanes 0, 8, 16, 24
#pragma unroll
      for (int r = 0; r < kStep; ++r) missing |= (votes >> r * Tile::kPanel & 1) << (i * kStep + r);
    }
    return missing;
  }

  // Loads Q of a segment whose first keys are being loaded.
  __device__ __forceinline__ void load_queries(const Queries& queries, uint32_t segment) {
    shared.q_pipe.wait_empty(segment);
    const ColumnRows& rows = queries.rows;
    const uint32_t tile = ptx::shared_address(shared.q);
#pragma unroll
    for (int i = 0; i < kWarpQueries / kStep; ++i) {
      const int32_t own = warp * kWarpQueries + row + i * kStep;
      const bool used = own < rows.count();
      const int32_t at = used ? own : 0;
      copy_row<typename C::QTile>(tile, own,
                                  call.query.at<const T>(queries.leading, queries.batch_row, rows.head(at),
                                                         queries.q_begin + rows.position(at)),
                                  used);
    }
    publish(shared.q_pipe.full_barrier(segment));
  }

  static constexpr int32_t kUnused = -1;

  const LatentCall& call;
  typename C::Shared& shared;
  const typename C::Column& column;
  const Partition& partition;
  int32_t number;  // number of the CTA's range
  ptx::L2Policy policy;
  WorkIterator<C::kTile> ahead;
  Interval keys;
  const T* pool;
  const int32_t* table;
  int32_t list;          // the number of the segment's list of tiles, as in SequenceWork
  int warp, row, chunk;  // row: this thread's first row among those of its warp
  int chunks;            // chunks of a row of the operand that this thread copies
  int32_t page[kRowsOfThread], slot[kRowsOfThread];
};

// Finds a CTA's part of a call. If there is any, run(kv_head, loader) attends to it, with the barriers of
// shared memory in place.
template <class C, class Run>
__device__ __forceinline__ void run_latent(const LatentCall& call, typename C::Shared& shared, Run run) {
  ptx::let_next_kernel_start();  // combine_latent() is launched while the last CTAs run
  if (threadIdx.x == 0) shared.init();
  if (C::Column::kSkips && call.lists) ptx::wait_for_kernel_before();  // which makes the lists
  clear_outside<typename C::Element, C::kThreads>(call);
  const int32_t number = call.columns.quotient(static_cast<int32_t>(blockIdx.x));
  const typename C::Column column{call, static_cast<int32_t>(blockIdx.x) - number * call.columns.value};
  Range range;
  auto& found = *reinterpret_cast<PartitionShared<C::kThreads>*>(shared.q);
  const Partition partition = find_range<C::kTile, C::kThreads>(call, column, found, number, range);
  if (threadIdx.x == 0) clear_split<C::kRows>(call, number, column.kv_head);
  if (range.begin >= range.end) return;
  __syncthreads();  // all threads have read `found`, and the barriers are initialised
  run(column.kv_head, LatentLoader<C>(call, shared, column, partition, range, number));
}

}  // namespace jax_flash::decode
