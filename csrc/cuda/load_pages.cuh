// Keys and values of a block that lie in the pages of a pool: what load_kv.cuh's ring is filled from.
//
// A thread finds the slot of one key of a tile, a tile before its copy begins, so that the table's latency is
// hidden behind a whole step of the main loop. The copies then go row by row, from offsets in shared memory.
#pragma once

#include <cstdint>

#include "core/float8.h"
#include "core/paging.h"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/tile/shared_tile.cuh"
#include "cuda/work.cuh"

namespace jax_flash {

// In the place of a page: outside the pool, and past the sequence's keys.
inline constexpr int32_t kMissingPage = -1, kNoPage = -2;

// One of key and value at one KV head. Strides in elements.
template <class Pool>
struct GlobalPages {
  const Pool* data;
  int64_t page, slot;
  int32_t columns;  // used, a multiple of 8

  // Of a slot, or what it is instead.
  __device__ __forceinline__ int64_t offset(PageSlot s) const {
    return s.page >= 0 ? s.page * page + s.slot * slot : s.page;
  }
};

template <class Pool>
__device__ __forceinline__ GlobalPages<Pool> pages_of(const Problem& p, const View& pool, int64_t leading,
                                                      int32_t kv_head, int32_t columns) {
  const int64_t first = pool.leading_offset(p.leading, leading) + kv_head * pool.head;
  return {pool.as<const Pool>() + first, pool.batch, pool.row, columns};
}

// What keys outside the pool are: NaN in every dtype.
static __device__ const uint4 kNanChunk = {0x7FFF7FFFu, 0x7FFF7FFFu, 0x7FFF7FFFu, 0x7FFF7FFFu};

// Where a key and its value begin, as offsets in the pools; or kMissingPage, kNoPage.
struct KeyOffsets {
  int64_t key, value;
};

// Starts the copy of the rows at `offsets`. Past the keys and, of values, outside the pool they are zeros.
template <class Tile, int kThreads, bool kNanIfMissing>
__device__ __forceinline__ void load_pages(uint32_t shared, const GlobalPages<typename Tile::Element>& from,
                                           const KeyOffsets* offsets, int64_t KeyOffsets::* which) {
  using T = typename Tile::Element;
  constexpr int kTotal = Tile::kRows * Tile::kChunks;
#pragma unroll
  for (int i = 0; i < kTotal; i += kThreads) {
    const int at = i + static_cast<int>(threadIdx.x);
    const int row = at / Tile::kChunks, chunk = at % Tile::kChunks;
    if (kTotal % kThreads != 0 && at >= kTotal) continue;
    const int64_t offset = offsets[row].*which;
    const bool found = offset >= 0, used = found || (kNanIfMissing && offset == kMissingPage);
    const void* source =
        found ? static_cast<const void*>(from.data + offset + chunk * kChunk<T>) : &kNanChunk;
    ptx::cp_async_16(shared + Tile::offset(row, chunk), source, used && chunk * kChunk<T> < from.columns);
  }
}

// As many float8 as there are T in a chunk.
template <class T>
struct Float8Chunk {
  static constexpr int kWords = kChunk<T> / 4;
  uint32_t words[kWords];

  __device__ __forceinline__ void fill(uint32_t word) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = word;
  }
  __device__ __forceinline__ void read(const uint8_t* from) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = reinterpret_cast<const uint32_t*>(from)[i];
  }
  __device__ __forceinline__ float at(int i) const {
    return float8_to_float(static_cast<uint8_t>(words[i / 4] >> i % 4 * 8));
  }
  __device__ __forceinline__ uint4 wide() const {
    if constexpr (sizeof(T) == 2) {
      return {ptx::pack<T>(at(0), at(1)), ptx::pack<T>(at(2), at(3)), ptx::pack<T>(at(4), at(5)),
              ptx::pack<T>(at(6), at(7))};
    } else {
      return {__float_as_uint(at(0)), __float_as_uint(at(1)), __float_as_uint(at(2)), __float_as_uint(at(3))};
    }
  }
};

// The same of float8, which is widened in registers: all loads first, then all stores.
template <class Tile, int kThreads, bool kNanIfMissing>
__device__ __forceinline__ void load_pages(uint32_t shared, const GlobalPages<uint8_t>& from,
                                           const KeyOffsets* offsets, int64_t KeyOffsets::* which) {
  using T = typename Tile::Element;
  constexpr int kTotal = Tile::kRows * Tile::kChunks, kSteps = (kTotal + kThreads - 1) / kThreads;
  constexpr uint32_t kNans = 0x7F7F7F7Fu;
  Float8Chunk<T> chunks[kSteps];
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const int at = i * kThreads + static_cast<int>(threadIdx.x);
    const int row = at / Tile::kChunks, column = at % Tile::kChunks * kChunk<T>;
    const int64_t offset = at < kTotal ? offsets[row].*which : kNoPage;
    chunks[i].fill(kNanIfMissing && offset == kMissingPage && column < from.columns ? kNans : 0);
    if (offset >= 0 && column < from.columns) chunks[i].read(from.data + offset + column);
  }
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const int at = i * kThreads + static_cast<int>(threadIdx.x);
    const int row = at / Tile::kChunks, chunk = at % Tile::kChunks;
    if (at < kTotal) ptx::store_shared(shared + Tile::offset(row, chunk), chunks[i].wide());
  }
}

template <class T, class Pool, int kRows, int kStages>
struct PageSource {
  using Offsets = KeyOffsets[kStages + 1][kRows];  // of tile n at n % (kStages + 1)

  const GlobalPages<Pool>&key, &value;
  const PageTable& table;
  const int32_t& end;  // keys of the sequence
  Offsets& offsets;
  PageSlot next = {kNoPage, 0};

  template <class Tile, int kThreads>
  __device__ __forceinline__ void load_first(uint32_t shared, int32_t n) const {
    static_assert(Tile::kRows == kRows);
    load_pages<Tile, kThreads, true>(shared, key, offsets[n % (kStages + 1)], &KeyOffsets::key);
  }
  template <class Tile, int kThreads>
  __device__ __forceinline__ void load_second(uint32_t shared, int32_t n) const {
    load_pages<Tile, kThreads, false>(shared, value, offsets[n % (kStages + 1)], &KeyOffsets::value);
  }

  __device__ __forceinline__ void start(int32_t n) {
    for (int i = 0; i < kStages; ++i) put(n + i, find(n + i));
    next = find(n + kStages);
    __syncthreads();
  }
  __device__ __forceinline__ void look_ahead(int32_t n) {
    put(n, next);
    next = find(n + 1);
  }

 private:
  __device__ __forceinline__ void put(int32_t n, PageSlot slot) const {
    if (threadIdx.x < kRows) offsets[n % (kStages + 1)][threadIdx.x] = {key.offset(slot), value.offset(slot)};
  }
  __device__ __forceinline__ PageSlot find(int32_t n) const {
    const int64_t key_index = int64_t{n} * kRows + threadIdx.x;
    if (threadIdx.x >= kRows || key_index >= end) return {kNoPage, 0};
    const PageSlot found = table.at(static_cast<int32_t>(key_index));
    return table.in_pool(found.page) ? found : PageSlot{kMissingPage, 0};
  }
};

}  // namespace jax_flash
