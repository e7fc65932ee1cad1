// The float32 accumulator of dQ by tiles: [entries, h, query tiles, M / 64, d / 8, 4, 128], where an entry is
// a leading one, and of fixed layouts a batch entry of it. A block of 128 is 16 rows × 8 columns in the order
// in which wgmma leaves them in a warp's registers: lane l adds the 16 bytes from 4 l on, so that one
// instruction of a warp adds 512 bytes that lie one after the other, and a consumer's part of a tile is one
// piece. Packed sequences begin with a tile (first_slot).
#pragma once

#include "core/plan/workspace.h"
#include "core/problem.h"
#include "core/sequence.h"
#include "cuda/hopper/roles.cuh"
#include "cuda/launch.h"
#include "cuda/ptx/math.cuh"
#include "cuda/registry.h"
#include "cuda/tile/shared_tile.cuh"

namespace jax_flash {

inline constexpr int kSumRows = 16, kSumColumns = 8, kSumBlock = kSumRows * kSumColumns,
                     kSumBlocks = kConsumerRows / kSumRows, kSumColumn = kSumBlocks * kSumBlock;

struct QuerySums {
  float* data;
  int32_t tiles;  // of a head
};

inline int64_t sum_entries(const Problem& p) { return p.leading.count() * (p.packed() ? 1 : p.batch); }

// A consumer's part of dQ in its tile: where it begins, and its columns / 8.
struct SumPart {
  int32_t first, columns;
};

template <class C>
__device__ __forceinline__ SumPart sum_part(int32_t head_dim, int32_t consumer) {
  if (C::kDqByRows) return {consumer * kConsumerRows * head_dim, head_dim / kSumColumns};
  const int32_t column = consumer * C::kDqColumns / kSumColumns;
  return {column * kSumColumn, min(head_dim / kSumColumns - column, C::kDqColumns / kSumColumns)};
}

template <int kM>
QuerySums query_sums(const Problem& p, float* data) {
  return {data, static_cast<int32_t>(dq_tiles(p.spec, p.q_rows, p.batch, kM).value())};
}

template <int kM>
cudaError_t clear_sums(const Problem& p, const QuerySums& sums, cudaStream_t stream) {
  const int64_t count = sum_entries(p) * p.heads * sums.tiles * kM * p.head_dim;
  if (count == 0) return cudaSuccess;
  return cudaMemsetAsync(sums.data, 0, count * sizeof(float), stream);
}

// Where the queries of packed sequences begin, [n + 1] each 2 · (n + 2) apart, in the schedule of the keys;
// null where there is no key.
inline const int32_t* query_starts_of_keys(const Problem& p, const TileGrid& keys, const void* workspace) {
  const TileWork* schedule = schedule_of(keys, workspace);
  if (!schedule) return nullptr;
  return reinterpret_cast<const int32_t*>(schedule + p.leading.count() * keys.tiles) + p.batch + 3;
}

template <class T>
struct SumConversion {
  T* to;  // [entries, q_rows, h, d]
  QuerySums sums;
  const int32_t* starts;  // of packed queries, else null
  int32_t sequences, q_rows, heads, head_dim;
  float scale;
};

// Zeros packed rows outside all sequences. The share of block `block` of `blocks`.
template <class T>
__device__ void clear_outside(const SumConversion<T>& c, T* to, const int32_t* starts, int block,
                              int blocks) {
  const int64_t row = int64_t{c.heads} * c.head_dim / kChunk<T>, before = starts[0] * row;
  const int64_t after = starts[c.sequences] * row, end = c.q_rows * row;
  auto* const chunks = reinterpret_cast<uint4*>(to);
  const int64_t first = int64_t{block} * blockDim.x + threadIdx.x, step = int64_t{blocks} * blockDim.x;
  for (int64_t i = first; i < before; i += step) chunks[i] = uint4{};
  for (int64_t i = after + first; i < end; i += step) chunks[i] = uint4{};
}

inline constexpr int kSumThreads = 256, kOutsideBlocks = 16;

// to = scale · sums, rounded. A block has a query tile of a head, a thread 8 columns of rows r and r + 8; the
// last kOutsideBlocks blocks of an entry of packed rows have what lies outside all sequences.
template <class T, int kM>
__global__ void __launch_bounds__(kSumThreads) convert_tiles(const __grid_constant__ SumConversion<T> c) {
  const uint32_t tiles = c.sums.tiles, all = tiles * c.heads, blocks = all + (c.starts ? kOutsideBlocks : 0);
  const int64_t entry = blockIdx.x / blocks;
  const uint32_t in_entry = blockIdx.x % blocks;
  T* const to = c.to + entry * c.q_rows * c.heads * c.head_dim;
  const int32_t* const starts = c.starts ? c.starts + entry * 2 * (c.sequences + 2) : nullptr;
  if (in_entry >= all) {
    clear_outside(c, to, starts, static_cast<int>(in_entry - all), kOutsideBlocks);
    return;
  }
  const uint32_t tile = in_entry % tiles, head = in_entry / tiles;
  int64_t row = int64_t{tile} * kM, end = c.q_rows;
  if (starts) {
    if (c.sequences == 0 || tile < first_slot(starts[0], kM, 0)) return;
    const int32_t z = sequence_of_slot(starts, c.sequences, kM, tile);
    row = starts[z] + (tile - first_slot(starts[z], kM, z)) * kM, end = starts[z + 1];
  }
  const float* const from = c.sums.data + ((entry * c.heads + head) * tiles + tile) * kM * c.head_dim;
  const int columns = c.head_dim / kSumColumns;
  for (int unit = threadIdx.x; unit < kM / kSumRows * columns * 8; unit += kSumThreads) {
    const int r = unit % 8, column = unit / 8 % columns, block = unit / 8 / columns;
    const int64_t i = row + block * kSumRows + r;
    if (i >= end) continue;
    const int half = block / kSumBlocks;  // of a tile of 128 rows
    const auto* const quads = reinterpret_cast<const float4*>(
        from + ((half * columns + column) * kSumBlocks + block % kSumBlocks) * kSumBlock + r * 16);
    alignas(16) T upper[kSumColumns], lower[kSumColumns];
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const float4 x = quads[t];
      ptx::store_pair(upper + 2 * t, x.x * c.scale, x.y * c.scale);
      ptx::store_pair(lower + 2 * t, x.z * c.scale, x.w * c.scale);
    }
    T* const out = to + (i * c.heads + head) * c.head_dim + column * kSumColumns;
    *reinterpret_cast<uint4*>(out) = *reinterpret_cast<const uint4*>(upper);
    if (i + 8 >= end) continue;
    T* const below = out + int64_t{8} * c.heads * c.head_dim;
    *reinterpret_cast<uint4*>(below) = *reinterpret_cast<const uint4*>(lower);
  }
}

// dQ = scale · sums, rounded to T.
template <class T, int kM>
cudaError_t convert_sums(const Problem& p, const QuerySums& sums, const TileGrid& keys, const void* workspace,
                         cudaStream_t stream) {
  const int32_t* const starts = p.packed() ? query_starts_of_keys(p, keys, workspace) : nullptr;
  const int64_t elements = sum_entries(p) * p.q_rows * p.heads * p.head_dim;
  if (p.packed() && !starts) return cudaMemsetAsync(p.dquery.as<T>(), 0, elements * sizeof(T), stream);
  const int64_t blocks = int64_t{sums.tiles} * p.heads + (starts ? kOutsideBlocks : 0);
  const SumConversion<T> c{p.dquery.as<T>(), sums,    starts,     p.batch,
                           p.q_rows,         p.heads, p.head_dim, p.spec.scale};
  return launch(convert_tiles<T, kM>, sum_entries(p) * blocks, kSumThreads, 0, stream, c);
}

}  // namespace jax_flash
