// The loader of the paged layouts: it fills the tile ring of load/ring.cuh with keys and values from the
// pages of a pool.
//
// Each thread looks up the page of one key of a tile, one tile before its copy begins, so that the latency of
// the block table hides behind a whole iteration of the main loop. The addresses go through shared memory,
// and the copies then run row by row.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "core/families/portable_layout.h"
#include "core/float8.h"
#include "core/paging.h"
#include "cuda/load/float8_chunk.cuh"
#include "cuda/load/page_scales.cuh"
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
  int32_t columns;     // columns of a row that are used, a multiple of 8
  DType format;        // format of the elements

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

// The contents of keys on a missing page: these bytes are NaN in every dtype.
static __device__ const uint4 kNanChunk = {0x7FFF7FFFu, 0x7FFF7FFFu, 0x7FFF7FFFu, 0x7FFF7FFFu};

// A whole row of NaN, for the widest dtype.
struct NanRow {
  alignas(16) uint32_t words[kMaxHeadDim];
  constexpr NanRow() : words() {
    for (uint32_t& word : words) word = 0x7FFF7FFFu;
  }
};
static __device__ const NanRow kNanRow;

// The addresses of a key's row and of its value's row in global memory. The sign bit marks a row that is not
// read, and becomes zeros.
struct KeyAddress {
  uint64_t key, value;
};
static_assert(sizeof(KeyAddress) == kKeyAddressBytes);
inline constexpr uint64_t kUnread = uint64_t{1} << 63;

// Likewise for float8 pools: a key's slot, and the scales of its page.
struct Float8Address {
  PageSlot at;
  float key_scale, value_scale;
};
static_assert(sizeof(Float8Address) == kKeyAddressBytes);

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

// load_pages() for a float8 pool, which is widened in registers. cp.async cannot convert, so the loads of as
// many chunks as registers allow are issued first, and their stores follow. Keys on a missing page become
// NaN, values there zeros. scaled: multiplies by the value scales of the pages.
template <class Tile, int kThreads>
__device__ __forceinline__ void load_pages(uint32_t shared, const GlobalPages<uint8_t>& from,
                                           const Float8Address* addresses, bool nan_if_missing, bool scaled) {
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
      const PageSlot slot = at < kTotal ? addresses[row].at : PageSlot{kNoPage, 0};
      const bool used = column < from.columns;
      chunks[i].fill(used && nan_if_missing && slot.page == kMissingPage ? 0x7F7F7F7Fu : 0);
      if (used && slot.page >= 0) chunks[i].read(from.data + from.offset(slot) + column);
    }
    ptx::with_format(from.format, [&]<DType kFormat>() {
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int at = (first + i) * kThreads + static_cast<int>(threadIdx.x);
        const int row = at / Tile::kChunks, chunk = at % Tile::kChunks;
        if (at >= kTotal) continue;
        const uint4 x = scaled ? chunks[i].template wide<kFormat>(addresses[row].value_scale)
                               : chunks[i].template wide<kFormat>();
        ptx::store_shared(shared + Tile::offset(row, chunk), x);
      }
    });
  }
}

// TileRing's source for pages. The references point to shared memory. Tiles are numbered in the sequence (n),
// and in the order in which they are loaded (use).
template <class T, class Pool, int kRows, int kStages>
struct PageSource {
  static constexpr int kAhead = kStages + 1;  // tiles after the current one whose numbers must be known
  static constexpr bool kFloat8 = sizeof(Pool) == 1;
  using Address = std::conditional_t<kFloat8, Float8Address, KeyAddress>;
  using Addresses = Address[kStages + 1][kRows];  // a tile has row use % (kStages + 1)
  static_assert(sizeof(Addresses) == page_address_bytes(kRows, kStages));

  const GlobalPages<Pool>&key, &value;
  const PageScales &key_scales, &value_scales;
  const PageTable& table;
  const int32_t& end;  // the sequence's number of keys
  Addresses& addresses;
  int32_t* tiles;                // [kAhead]: the numbers of NextPairs
  PageSlot next = {kNoPage, 0};  // this thread's key in the tile after those in `addresses`

  template <class Tile, int kThreads>
  __device__ __forceinline__ void load_first(uint32_t shared, int32_t, int32_t use) const {
    static_assert(Tile::kRows == kRows);
    const Address* const rows = addresses[use % (kStages + 1)];
    if constexpr (kFloat8) {
      load_pages<Tile, kThreads>(shared, key, rows, true, false);
    } else {
      load_pages<Tile, kThreads>(shared, key, rows, &KeyAddress::key);
    }
  }
  template <class Tile, int kThreads>
  __device__ __forceinline__ void load_second(uint32_t shared, int32_t, int32_t use) const {
    const Address* const rows = addresses[use % (kStages + 1)];
    if constexpr (kFloat8) {
      load_pages<Tile, kThreads>(shared, value, rows, false, value_scales.data != nullptr);
    } else {
      load_pages<Tile, kThreads>(shared, value, rows, &KeyAddress::value);
    }
  }

  // The scale by page of key `row` of a tile, which the caller applies to S: rounded in the dtype of the
  // queries, scaled keys would change lse. Until the next tile is waited for.
  __device__ __forceinline__ float key_scale(int32_t use, int32_t row) const
    requires(kFloat8)
  {
    return addresses[use % (kStages + 1)][row].key_scale;
  }
  __device__ __forceinline__ int32_t* numbers() const { return tiles; }
  // Called by all threads before the first load. tile_at(i): the tile of use `first` + i.
  template <class, class, int, class TileAt>
  __device__ __forceinline__ void start(int32_t first, TileAt tile_at) {
#pragma unroll
    for (int i = 0; i < kStages; ++i) store_addresses(first + i, find(tile_at(i)));
    next = find(tile_at(kStages));
    __syncthreads();
  }
  // Called by all threads before a barrier that precedes the load of a use. `after`: the tile after its own.
  __device__ __forceinline__ void look_ahead(int32_t use, int32_t after) {
    store_addresses(use, next);
    next = find(after);
  }
  // Only the dense loader keeps addresses that tiles which are left out move.
  template <class>
  __device__ __forceinline__ void skip(int32_t) const {}

 private:
  __device__ __forceinline__ void store_addresses(int32_t use, PageSlot slot) const {
    if (threadIdx.x >= kRows) return;
    Address& to = addresses[use % (kStages + 1)][threadIdx.x];
    if constexpr (kFloat8) {
      to = {slot, key_scales.at(slot.page), value_scales.at(slot.page)};
    } else {
      to = {key.address(slot, true), value.address(slot, false)};
    }
  }
  // The slot of this thread's key in tile n.
  __device__ __forceinline__ PageSlot find(int32_t n) const {
    const int64_t position = int64_t{n} * kRows + threadIdx.x;
    if (threadIdx.x >= kRows || position >= end) return {kNoPage, 0};
    return table.lookup(static_cast<int32_t>(position));
  }
};

}  // namespace jax_flash
