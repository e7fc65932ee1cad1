// Keys and values of a block that lie in the pages of a pool: what load_kv.cuh's ring is filled from.
//
// A thread finds the slot of one key of a tile, a tile before its copy begins, so that the table's latency is
// hidden behind a whole step of the main loop. The copies then go row by row, from offsets in shared memory.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/float8.h"
#include "core/paging.h"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/float8.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/tile/copy.cuh"
#include "cuda/tile/shared_tile.cuh"
#include "cuda/work.cuh"

namespace jax_flash {

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
  // The same as a KeyAddress. Keys outside the pool are NaN, values there zeros.
  __device__ __forceinline__ uint64_t address(PageSlot s, bool nan_if_missing) const;
};

template <class Pool>
__device__ __forceinline__ GlobalPages<Pool> pages_of(const Problem& p, const View& pool, int64_t leading,
                                                      int32_t kv_head, int32_t columns) {
  const int64_t first = pool.leading_offset(p.leading, leading) + kv_head * pool.head;
  return {pool.as<const Pool>() + first, pool.batch, pool.row, columns};
}

// What the stored keys or values of a KV head are to be multiplied by.
__device__ __forceinline__ float scale_of_pool(const Problem& p, const View& scale, int64_t leading,
                                               int32_t kv_head) {
  if (!scale) return 1;
  return scale.as<const float>()[scale.leading_offset(p.leading, leading) + kv_head * scale.head];
}

// What keys outside the pool are: NaN in every dtype.
static __device__ const uint4 kNanChunk = {0x7FFF7FFFu, 0x7FFF7FFFu, 0x7FFF7FFFu, 0x7FFF7FFFu};

// A row of such: as many bytes as any head has.
struct NanRow {
  alignas(16) uint32_t words[kMaxHeadDim];
  constexpr NanRow() : words() {
    for (uint32_t& word : words) word = 0x7FFF7FFFu;
  }
};
static __device__ const NanRow kNanRow;

// Where a key and its value begin. Those that are not read, and are zeros, have the sign bit set.
struct KeyAddress {
  uint64_t key, value;
};
inline constexpr uint64_t kUnread = uint64_t{1} << 63;

__device__ __forceinline__ bool is_read(uint64_t address) { return static_cast<int64_t>(address) >= 0; }

template <class Pool>
__device__ __forceinline__ uint64_t GlobalPages<Pool>::address(PageSlot s, bool nan_if_missing) const {
  if (s.page >= 0) return reinterpret_cast<uint64_t>(data + offset(s));
  if (s.page == kMissingPage && nan_if_missing) return reinterpret_cast<uint64_t>(&kNanRow);
  return kUnread;
}

// Starts the copy of the rows at `addresses`.
template <class Tile, int kThreads>
__device__ __forceinline__ void load_pages(uint32_t shared, const GlobalPages<typename Tile::Element>& from,
                                           const KeyAddress* addresses, uint64_t KeyAddress::* which) {
  using T = typename Tile::Element;
  using Share = ThreadShare<Tile, kThreads>;
  const KeyAddress* const own = addresses + Share::row();
  const int column = Share::chunk() * kChunk<T>;
  Share::load(shared, Share::place(), from.columns, [&](int r) {
    const uint64_t address = own[r].*which;
    return typename Share::Row{reinterpret_cast<const T*>(address) + column, is_read(address)};
  });
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
      return {ptx::widen_float8<T>(words[0]), ptx::widen_float8<T>(words[0] >> 16),
              ptx::widen_float8<T>(words[1]), ptx::widen_float8<T>(words[1] >> 16)};
    } else {
      return {__float_as_uint(at(0)), __float_as_uint(at(1)), __float_as_uint(at(2)), __float_as_uint(at(3))};
    }
  }
};

// The same of float8, which is widened in registers: all loads first, as far as registers go, then all
// stores.
template <class Tile, int kThreads>
__device__ __forceinline__ void load_pages(uint32_t shared, const GlobalPages<uint8_t>& from,
                                           const KeyAddress* addresses, uint64_t KeyAddress::* which) {
  using T = typename Tile::Element;
  using Chunk = Float8Chunk<T>;
  constexpr int kTotal = Tile::kRows * Tile::kChunks, kSteps = (kTotal + kThreads - 1) / kThreads;
  constexpr int kRegisters = 32, kAtOnce = std::min(kSteps, kRegisters / Chunk::kWords);
#pragma unroll 1
  for (int first = 0; first < kSteps; first += kAtOnce) {
    Chunk chunks[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int at = (first + i) * kThreads + static_cast<int>(threadIdx.x);
      const int row = at / Tile::kChunks, column = at % Tile::kChunks * kChunk<T>;
      const uint64_t address = at < kTotal ? addresses[row].*which : kUnread;
      chunks[i].fill(0);
      if (is_read(address) && column < from.columns)
        chunks[i].read(reinterpret_cast<const uint8_t*>(address) + column);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int at = (first + i) * kThreads + static_cast<int>(threadIdx.x);
      const int row = at / Tile::kChunks, chunk = at % Tile::kChunks;
      if (at < kTotal) ptx::store_shared(shared + Tile::offset(row, chunk), chunks[i].wide());
    }
  }
}

template <class T, class Pool, int kRows, int kStages>
struct PageSource {
  using Addresses = KeyAddress[kStages + 1][kRows];  // of tile n at n % (kStages + 1)

  const GlobalPages<Pool>&key, &value;
  const PageTable& table;
  const int32_t& end;  // keys of the sequence
  Addresses& addresses;
  PageSlot next = {kNoPage, 0};

  template <class Tile, int kThreads>
  __device__ __forceinline__ void load_first(uint32_t shared, int32_t n) const {
    static_assert(Tile::kRows == kRows);
    load_pages<Tile, kThreads>(shared, key, addresses[n % (kStages + 1)], &KeyAddress::key);
  }
  template <class Tile, int kThreads>
  __device__ __forceinline__ void load_second(uint32_t shared, int32_t n) const {
    load_pages<Tile, kThreads>(shared, value, addresses[n % (kStages + 1)], &KeyAddress::value);
  }

  template <class, class, int>
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
    if (threadIdx.x < kRows)
      addresses[n % (kStages + 1)][threadIdx.x] = {key.address(slot, true), value.address(slot, false)};
  }
  __device__ __forceinline__ PageSlot find(int32_t n) const {
    const int64_t key_index = int64_t{n} * kRows + threadIdx.x;
    if (threadIdx.x >= kRows || key_index >= end) return {kNoPage, 0};
    const PageSlot found = table.at(static_cast<int32_t>(key_index));
    return table.in_pool(found.page) ? found : PageSlot{kMissingPage, 0};
  }
};

}  // namespace jax_flash
