// Keys and values that lie in the pages of a pool: the loader of the paged layouts, which fills the tile ring
// of load/ring.cuh.
//
// Each thread looks up the page of one key of a tile, one tile before its copy begins, so that the latency of
// the block table hides behind a whole iteration of the main loop. The addresses go through shared memory,
// and the copies then run row by row.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/families/portable_layout.h"
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

// The key pool or the value pool at one KV head. Strides are in elements.
template <class Pool>
struct GlobalPages {
  const Pool* data;
  int64_t page, slot;  // strides
  int32_t columns;     // of a row that are used, a multiple of 8
  DType format;        // of the elements

  // The offset of a slot's row in elements; for kMissingPage and kNoPage, that negative number itself.
  __device__ __forceinline__ int64_t offset(PageSlot s) const {
    return s.page >= 0 ? s.page * page + s.slot * slot : s.page;
  }
  // The address of a slot's row as KeyAddress holds it. A missing page reads as NaN (keys) or zeros (values).
  __device__ __forceinline__ uint64_t address(PageSlot s, bool nan_if_missing) const;
};

template <class Pool>
__device__ __forceinline__ GlobalPages<Pool> pages_of(const Problem& p, const View& pool, int64_t leading,
                                                      int32_t kv_head, int32_t columns) {
  const int64_t first = pool.leading_offset(p.leading, leading) + kv_head * pool.head;
  return {pool.as<const Pool>() + first, pool.batch, pool.row, columns, p.kv_dtype};
}

// The dequantisation scale of a float8 pool at one KV head, 1 without one.
__device__ __forceinline__ float scale_of_pool(const Problem& p, const View& scale, int64_t leading,
                                               int32_t kv_head) {
  if (!scale) return 1;
  return scale.as<const float>()[scale.leading_offset(p.leading, leading) + kv_head * scale.head];
}

// The contents of keys on a missing page: these bytes are NaN in every dtype.
static __device__ const uint4 kNanChunk = {0x7FFF7FFFu, 0x7FFF7FFFu, 0x7FFF7FFFu, 0x7FFF7FFFu};

// A whole row of them, at the widest dtype.
struct NanRow {
  alignas(16) uint32_t words[kMaxHeadDim];
  constexpr NanRow() : words() {
    for (uint32_t& word : words) word = 0x7FFF7FFFu;
  }
};
static __device__ const NanRow kNanRow;

// Where a key's row and its value's row begin in global memory. The sign bit marks a row that is not read and
// becomes zeros.
struct KeyAddress {
  uint64_t key, value;
};
static_assert(sizeof(KeyAddress) == kKeyAddressBytes);
inline constexpr uint64_t kUnread = uint64_t{1} << 63;

__device__ __forceinline__ bool is_read(uint64_t address) { return static_cast<int64_t>(address) >= 0; }

template <class Pool>
__device__ __forceinline__ uint64_t GlobalPages<Pool>::address(PageSlot s, bool nan_if_missing) const {
  if (s.page >= 0) return reinterpret_cast<uint64_t>(data + offset(s));
  if (s.page == kMissingPage && nan_if_missing) return reinterpret_cast<uint64_t>(&kNanRow);
  return kUnread;
}

// Starts the copies of a tile whose rows lie at addresses[i].*which.
template <class Tile, int kThreads>
__device__ __forceinline__ void load_pages(uint32_t shared, const GlobalPages<typename Tile::Element>& from,
                                           const KeyAddress* addresses, uint64_t KeyAddress::* which) {
  using T = typename Tile::Element;
  using Share = ThreadShare<Tile, kThreads>;
  const KeyAddress* const first = addresses + Share::row();
  const int column = Share::chunk() * kChunk<T>;
  Share::load(shared, Share::offset(), from.columns, [&](int r) {
    const uint64_t address = first[r].*which;
    return typename Share::Row{reinterpret_cast<const T*>(address) + column, is_read(address)};
  });
}

// As many float8 elements as a 16-byte chunk holds elements of T.
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
  // Widened to T.
  template <DType kFormat>
  __device__ __forceinline__ uint4 wide() const {
    if constexpr (sizeof(T) == 2) {
      return {ptx::widen_float8<T, kFormat>(words[0]), ptx::widen_float8<T, kFormat>(words[0] >> 16),
              ptx::widen_float8<T, kFormat>(words[1]), ptx::widen_float8<T, kFormat>(words[1] >> 16)};
    } else {
      const auto at = [&](int i) {
        return __float_as_uint(float8_to_float<kFormat>(static_cast<uint8_t>(words[0] >> 8 * i)));
      };
      return {at(0), at(1), at(2), at(3)};
    }
  }
};

// load_pages for a float8 pool, which is widened in registers. cp.async cannot convert, so the loads of as
// many chunks as registers allow are issued first, and their stores follow.
template <class Tile, int kThreads>
__device__ __forceinline__ void load_pages(uint32_t shared, const GlobalPages<uint8_t>& from,
                                           const KeyAddress* addresses, uint64_t KeyAddress::* which) {
  using T = typename Tile::Element;
  using Chunk = Float8Chunk<T>;
  constexpr int kTotal = Tile::kRows * Tile::kChunks, kSteps = (kTotal + kThreads - 1) / kThreads;
  constexpr int kRegisters = 32, kInFlight = std::min(kSteps, kRegisters / Chunk::kWords);
#pragma unroll 1
  for (int first = 0; first < kSteps; first += kInFlight) {
    Chunk chunks[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int at = (first + i) * kThreads + static_cast<int>(threadIdx.x);
      const int row = at / Tile::kChunks, column = at % Tile::kChunks * kChunk<T>;
      const uint64_t address = at < kTotal ? addresses[row].*which : kUnread;
      chunks[i].fill(0);
      if (is_read(address) && column < from.columns)
        chunks[i].read(reinterpret_cast<const uint8_t*>(address) + column);
    }
    ptx::with_format(from.format, [&]<DType kFormat>() {
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int at = (first + i) * kThreads + static_cast<int>(threadIdx.x);
        const int row = at / Tile::kChunks, chunk = at % Tile::kChunks;
        if (at < kTotal)
          ptx::store_shared(shared + Tile::offset(row, chunk), chunks[i].template wide<kFormat>());
      }
    });
  }
}

// TileRing's source for pages. The references point to shared memory.
template <class T, class Pool, int kRows, int kStages>
struct PageSource {
  using Addresses = KeyAddress[kStages + 1][kRows];  // tile n has row n % (kStages + 1)
  static_assert(sizeof(Addresses) == page_address_bytes(kRows, kStages));

  const GlobalPages<Pool>&key, &value;
  const PageTable& table;
  const int32_t& end;  // the sequence's number of keys
  Addresses& addresses;
  PageSlot next = {kNoPage, 0};  // this thread's key of the tile after the ones in `addresses`

  template <class Tile, int kThreads>
  __device__ __forceinline__ void load_first(uint32_t shared, int32_t n) const {
    static_assert(Tile::kRows == kRows);
    load_pages<Tile, kThreads>(shared, key, addresses[n % (kStages + 1)], &KeyAddress::key);
  }
  template <class Tile, int kThreads>
  __device__ __forceinline__ void load_second(uint32_t shared, int32_t n) const {
    load_pages<Tile, kThreads>(shared, value, addresses[n % (kStages + 1)], &KeyAddress::value);
  }

  // Called by all threads before tiles [n, n + kStages) are loaded.
  template <class, class, int>
  __device__ __forceinline__ void start(int32_t n) {
    for (int i = 0; i < kStages; ++i) store_addresses(n + i, find(n + i));
    next = find(n + kStages);
    __syncthreads();
  }
  // Called by all threads before a barrier that precedes the load of tile n.
  __device__ __forceinline__ void look_ahead(int32_t n) {
    store_addresses(n, next);
    next = find(n + 1);
  }

 private:
  __device__ __forceinline__ void store_addresses(int32_t n, PageSlot slot) const {
    if (threadIdx.x < kRows)
      addresses[n % (kStages + 1)][threadIdx.x] = {key.address(slot, true), value.address(slot, false)};
  }
  // Where this thread's key of tile n lies.
  __device__ __forceinline__ PageSlot find(int32_t n) const {
    const int64_t position = int64_t{n} * kRows + threadIdx.x;
    if (threadIdx.x >= kRows || position >= end) return {kNoPage, 0};
    return table.lookup(static_cast<int32_t>(position));
  }
};

}  // namespace jax_flash
