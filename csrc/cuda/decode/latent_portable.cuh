// Decode over latent pools on sm_80 and newer: the absorbed form of multi-head latent attention
// (DeepSeek-V2).
//
// All warps of a CTA work on one tile of keys, which is K and, in its first columns, V:
//
//   S = Q Kᵀ       the warps share out row tiles, key tiles and, where these are few, the head dim
//   P = 2^(S − m)  a warp takes a row
//   O ← α O + P V  a warp has 64 of O's columns
#pragma once

#include <cmath>
#include <cstdint>

#include "core/draft.h"
#include "core/families/latent_layout.h"
#include "cuda/decode/combine.cuh"
#include "cuda/decode/latent_call.cuh"
#include "cuda/decode/results.cuh"
#include "cuda/launch.h"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/registry.h"
#include "cuda/tile/fragments.cuh"

namespace jax_flash::decode::inline JF_ARCH_NAMESPACE {

// A row of csrc/kernels.def: M query rows of a KV head, and N keys per tile.
template <class T, RowColumns R>
struct LatentSm80 {
  using Element = T;
  static constexpr int kHeadDim = R.head_dim, kValueDim = R.value_dim, kRows = R.block_m, kTile = R.block_n;
  static constexpr int kStages = R.stages, kWarps = R.warps, kThreads = kWarps * 32;
  using QTile = SharedTile<T, kRows, kHeadDim>;
  using KTile = SharedTile<T, kTile, kHeadDim>;
  using PTile = SharedTile<T, kRows, latent::kLeastTile>;  // of which kTile columns are used
  // The warps' shares of S, 16 × 16 each, and of the head dim.
  static constexpr int kRowTiles = kRows / 16, kKeyTiles = kTile / 16,
                       kSplits = kWarps / (kRowTiles * kKeyTiles);
  static constexpr latent::PortableLayout kLayout =
      latent::portable_layout(kHeadDim, kRows, kTile, kStages, kSplits);
  using O = Accumulator<kRowTiles, kValueDim / kWarps / 8>;
  static_assert(kSplits * kRowTiles * kKeyTiles == kWarps && kValueDim / kWarps == 64 && kTile <= 32);
  static_assert(sizeof(PartitionShared<kThreads>) <= kBlockStateBytes);
};

template <class C>
class LatentBlock {
 public:
  using T = typename C::Element;

  __device__ __forceinline__ LatentBlock(const LatentCall& decode, const LatentColumn<C::kRows>& of_column,
                                         const Partition& of_ranges, int32_t range_number)
      : call(decode), column(of_column), partition(of_ranges), number(range_number) {
    uint8_t* const shared = ptx::dynamic_shared();
    tiles = ptx::shared_address(shared);
    scores = reinterpret_cast<float*>(shared + C::kLayout.scores);
    weights = shared + C::kLayout.weights;
    state = reinterpret_cast<Softmax*>(shared + C::kLayout.softmax);
    alphas = reinterpret_cast<float*>(shared + C::kLayout.alpha);
    rows_of_keys = reinterpret_cast<KeyRow*>(shared + C::kLayout.key_rows);
  }

  __device__ __forceinline__ void run(const Range& range) {
    WorkIterator<C::kTile> segment(range);
#pragma unroll 1
    while (!segment.done()) {
      work = segment.open(call, column);
      const auto entry = column.entry(segment.index);
      const ColumnRows rows = column.rows(entry);
      const Parts parts = Parts::of(call.grid, partition, segment, number);
      if (threadIdx.x == 0 && parts.count > 1)
        prepare_counter(PartialResults<C::kRows>(call).counter(parts, column.kv_head));
      attend(rows, segment.tile, segment.tile_end);
      finish(rows, parts);
      segment.advance();
    }
  }

 private:
  // Where a key lies: an offset in the pool; negative: it is not read.
  using KeyRow = int64_t;
  static constexpr KeyRow kMissing = -2, kUnused = -1;

  __device__ __forceinline__ static int warp() { return static_cast<int>(threadIdx.x / 32); }
  __device__ __forceinline__ uint32_t key_tile(int32_t n) const {
    return tiles + C::kLayout.keys + n % C::kStages * C::KTile::kBytes;
  }

  __device__ __forceinline__ void attend(const ColumnRows& rows, int32_t begin, int32_t end) {
    o.clear();
    if (threadIdx.x < C::kRows) state[threadIdx.x] = {-INFINITY, 0};
    load_queries(rows);
#pragma unroll 1
    for (int32_t n = begin; n < begin + C::kStages - 1; ++n) {
      find_keys(n, end);
      __syncthreads();
      load_keys(n, end);
    }
    find_keys(begin + C::kStages - 1, end);
#pragma unroll 1
    for (int32_t n = begin; n < end; ++n) {
      ptx::cp_async_wait<C::kStages - 2>();
      __syncthreads();  // the tile is there; the one before is used up
      load_keys(n + C::kStages - 1, end);
      multiply_keys(n);
      __syncthreads();
      find_keys(n + C::kStages, end);
      exponentiate(rows, n);
      __syncthreads();
      multiply_values(n);
    }
    ptx::cp_async_wait<0>();
  }

  // Finds where this thread's key of tile n lies.
  __device__ __forceinline__ void find_keys(int32_t n, int32_t end) const {
    if (threadIdx.x >= C::kTile || n >= end) return;
    const int64_t key = int64_t{n} * C::kTile + threadIdx.x;
    KeyRow at = kUnused;
    if (work.keys.lo <= key && key < work.keys.hi) {
      const int32_t entry = call.page_size.quotient(static_cast<int32_t>(key));
      const int32_t slot = static_cast<int32_t>(key) - entry * call.page_size.value;
      const int32_t page = call.block_tables.at<const int32_t>(work.leading, work.index, 0, 0)[entry];
      const bool inside = static_cast<uint32_t>(page) < static_cast<uint32_t>(call.pages);
      at = inside ? page * call.key.batch + slot * call.key.row : kMissing;
    }
    rows_of_keys[n % (C::kStages + 1) * C::kTile + threadIdx.x] = at;
  }

  // Copies rows of a tile; row(i): the address of the i-th, null where it is not read.
  template <class Tile, class Row>
  __device__ __forceinline__ void load_rows(uint32_t tile, Row row) const {
#pragma unroll 1
    for (int at = static_cast<int>(threadIdx.x); at < Tile::kRows * Tile::kChunks; at += C::kThreads) {
      const int i = at / Tile::kChunks, chunk = at % Tile::kChunks;
      const T* const from = row(i);
      ptx::cp_async_16(tile + Tile::offset(i, chunk), from + chunk * kChunk<T>,
                       from && chunk * kChunk<T> < call.head_dim);
    }
  }
  __device__ __forceinline__ void load_queries(const ColumnRows& rows) const {
    load_rows<typename C::QTile>(tiles, [&](int i) -> const T* {
      if (i >= rows.count()) return nullptr;
      return call.query.at<const T>(work.leading, work.batch_row, rows.head(i),
                                    work.q_begin + rows.position(i));
    });
  }
  // One group of copies for each tile, an empty one past the end. The first has Q too.
  __device__ __forceinline__ void load_keys(int32_t n, int32_t end) const {
    if (n < end) {
      const T* const pool = call.key.at<const T>(work.leading, 0, column.kv_head, 0);
      const KeyRow* const found = rows_of_keys + n % (C::kStages + 1) * C::kTile;
      load_rows<typename C::KTile>(key_tile(n),
                                   [&](int i) { return found[i] < 0 ? nullptr : pool + found[i]; });
    }
    ptx::cp_async_commit();
  }

  // S = Q Kᵀ, in as many summands as the head dim is split into.
  __device__ __forceinline__ void multiply_keys(int32_t n) const {
    constexpr int kSteps = C::kHeadDim / 16;
    const int split = warp() / (C::kRowTiles * C::kKeyTiles), tile = warp() % (C::kRowTiles * C::kKeyTiles);
    const int row = tile / C::kKeyTiles * 16, key = tile % C::kKeyTiles * 16;
    Accumulator<1, 2> s;
    s.clear();
    const RowsA<typename C::QTile> q(tiles, row);
    const RowsB<typename C::KTile> k(key_tile(n), key);
#pragma unroll 4
    for (int step = split * kSteps / C::kSplits; step < (split + 1) * kSteps / C::kSplits; ++step)
      multiply_add_step<T>(s, q, k, step);
    float* const to = scores + split * C::kRows * C::kLayout.pitch;
#pragma unroll
    for (int slot = 0; slot < 2; ++slot)
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          to[(row + s.row(slot)) * C::kLayout.pitch + key + s.column(j, e)] = s.at(slot, j, e);
  }

  // The score of a key in powers of two: softcap, ALiBi, the band, the draft mask.
  __device__ __forceinline__ float score(const ColumnRows& rows, int32_t row, int32_t key, float x) const {
    const int32_t position = rows.position(row);
    if (!work.band.row(position).contains(key)) return -INFINITY;
    x *= call.scale;
    if (call.softcap > 0) x = call.softcap * tanhf(x / call.softcap);
    if (call.alibi_slopes) {
      const float slope = *call.alibi_slopes.at<const float>(work.leading, work.index, rows.head(row), 0);
      x -= slope * fabsf(static_cast<float>(work.band.diagonal(position) - key));
    }
    const int32_t q_len = work.band.q_len;
    if (call.draft_mask && has_drafts(q_len, call.draft_rows)) {
      const DraftMask drafts{call.draft_mask.at<const uint8_t>(work.leading, work.index, 0, 0),
                             call.draft_mask.row, first_draft(q_len, work.band.k_len)};
      if (drafts.hides(position, key)) return -INFINITY;
    }
    return x * kLog2e;
  }

  // m ← max(m, rowmax S); P = 2^(S − m); l ← α l + rowsum P. A lane has one key of the tile.
  __device__ __forceinline__ void exponentiate(const ColumnRows& rows, int32_t n) {
    const int lane = lane_id();
    const KeyRow* const found = rows_of_keys + n % (C::kStages + 1) * C::kTile;
    const bool missing = lane < C::kTile && found[lane] == kMissing;
#pragma unroll 1
    for (int row = warp(); row < C::kRows; row += C::kWarps) {
      float x = -INFINITY;
      if (lane < C::kTile && row < rows.count()) {
        x = missing ? NAN : 0;
#pragma unroll
        for (int split = 0; split < C::kSplits; ++split)
          x += scores[(split * C::kRows + row) * C::kLayout.pitch + lane];
        x = score(rows, row, n * C::kTile + lane, x);
      }
      const Softmax before = state[row];
      const float m = fmaxf(before.m, warp_max(x)), bound = m == -INFINITY ? 0 : m;
      const float alpha = ptx::exp2(before.m - bound), p = ptx::exp2(x - bound);
      const float l = fmaf(before.l, alpha, warp_sum(p));
      if (lane < C::kTile) {
        const int offset =
            C::PTile::offset(row, lane / kChunk<T>) + lane % kChunk<T> * static_cast<int>(sizeof(T));
        *reinterpret_cast<T*>(weights + offset) = T(p);
      }
      if (lane == 0) state[row] = {m, l}, alphas[row] = alpha;
    }
  }

  // O ← α O + P V
  __device__ __forceinline__ void multiply_values(int32_t n) {
#pragma unroll
    for (int slot = 0; slot < C::O::kSlots; ++slot) o.scale_row(slot, alphas[C::O::row(slot)]);
    multiply_add<T, C::kTile / 16>(o, RowsA<typename C::PTile>(tiles + C::kLayout.weights, 0),
                                   ColumnsB<typename C::KTile, 16>(key_tile(n), 64 * warp()));
  }

  // Writes the results of a segment, or merges them with those of the entry's other parts if this one is the
  // last to be finished.
  __device__ __forceinline__ void finish(const ColumnRows& rows, const Parts& parts) {
    __shared__ bool is_last;
    const PartialResults<C::kRows> partial(call);
    const int64_t first =
        parts.count == 1 ? 0 : partial.row(parts.slot(call.grid, parts.own), column.kv_head, 0);
#pragma unroll
    for (int slot = 0; slot < C::O::kSlots; ++slot) {
      const int32_t row = C::O::row(slot);
      if (row >= rows.count() || !is_written(call, rows, work, row)) continue;
      if (parts.count == 1) {
        store_row(rows, row, slot);
      } else {
        store_partial(partial, first + row, row, slot);
      }
    }
    __syncthreads();  // all of the segment's shared memory is read, and its results are stored
    if (parts.count == 1) return;
    if (threadIdx.x == 0) is_last = count_part(partial.counter(parts, column.kv_head), parts.count);
    __syncthreads();
    if (is_last) combine<C>(call, rows, work, partial, parts, column.kv_head);
  }
  __device__ __forceinline__ static int32_t feature(int n) { return 64 * warp() + C::O::column(n); }

  __device__ __forceinline__ void store_row(const ColumnRows& rows, int32_t row, int slot) {
    const int32_t head = rows.head(row), i = rows.position(row);
    const auto [factor, lse] = finish_row(call, work, head, i, state[row]);
    T* const to = call.out.at<T>(work.leading, work.batch_row, head, work.q_begin + i);
    const bool zero = factor == 0;
#pragma unroll
    for (int n = 0; n < C::O::kColumnTiles; ++n) {
      if (feature(n) < call.value_dim)
        ptx::store_pair(to + feature(n), zero ? 0 : o.at(slot, n, 0) * factor,
                        zero ? 0 : o.at(slot, n, 1) * factor);
    }
    if (threadIdx.x < 32 && threadIdx.x % 4 == 0)
      *call.lse.at<float>(work.leading, work.batch_row, head, work.q_begin + i) = lse;
  }
  __device__ __forceinline__ void store_partial(const PartialResults<C::kRows>& partial, int64_t to,
                                                int32_t row, int slot) {
#pragma unroll
    for (int n = 0; n < C::O::kColumnTiles; ++n) {
      if (feature(n) < call.value_dim)
        *reinterpret_cast<float2*>(partial.o + to * partial.width + feature(n)) =
            make_float2(o.at(slot, n, 0), o.at(slot, n, 1));
    }
    if (threadIdx.x < 32 && threadIdx.x % 4 == 0) partial.softmax[to] = state[row];
  }

  const LatentCall& call;
  const LatentColumn<C::kRows>& column;
  const Partition& partition;
  int32_t number;  // of the CTA's range
  SequenceWork work;
  uint32_t tiles;  // Q, and the ring of keys
  float* scores;
  uint8_t* weights;
  Softmax* state;
  float* alphas;
  KeyRow* rows_of_keys;  // of the tiles in the ring and of the tile that comes next
  typename C::O o;
};

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1) latent_sm80(const __grid_constant__ LatentCall call) {
  __shared__ PartitionShared<C::kThreads> found;
  clear_outside<typename C::Element, C::kThreads>(call);
  const int32_t number = call.columns.quotient(static_cast<int32_t>(blockIdx.x));
  const LatentColumn<C::kRows> column{call, static_cast<int32_t>(blockIdx.x) - number * call.columns.value};
  Range range;
  const Partition partition = find_range<C::kTile, C::kThreads>(call, column, found, number, range);
  if (range.begin < range.end) LatentBlock<C>(call, column, partition, number).run(range);
}

template <class C>
cudaError_t launch_latent(const Problem& p, const LaunchPlan& plan, void* workspace, cudaStream_t stream) {
  const DecodeGrid& grid = plan.decode;
  const int64_t blocks = int64_t{grid.columns} * grid.ranges;
  if (blocks == 0) return cudaSuccess;
  const int32_t* starts = p.packed() ? query_starts(p, plan.queries, workspace) : nullptr;
  for (int64_t outer = 0; outer < outer_entries(p.leading); ++outer) {
    const LatentCall call = make_latent_call<C::kTile>(p, grid, C::kRows, outer, starts, workspace);
    const cudaError_t e =
        jax_flash::launch(latent_sm80<C>, blocks, C::kThreads, C::kLayout.bytes, stream, call);
    if (e != cudaSuccess) return e;
  }
  return cudaSuccess;
}

}  // namespace jax_flash::decode::inline JF_ARCH_NAMESPACE
