// A ring of key and value tiles in shared memory that belongs to one warp, which both fills and reads it:
// copies and products need no barrier across the thread block.
//
// A stage holds kKeys keys and their values. Under load a block-table lookup takes longer than the copy of a
// stage. So in a long segment, the table entries for the tile that will use a stage next are copied together
// with the tile that uses it now. In other segments pages are looked up one tile ahead; for a segment's first
// tile this happens during the last copy of the segment before it. The first kStages copies are started by
// the loop itself, and not by a prologue, because a kernel's first instructions are fetched from memory, and
// short code takes less time.
#pragma once

#include <cstdint>

#include "core/families/portable_layout.h"
#include "cuda/decode/partition.cuh"
#include "cuda/decode/results.cuh"
#include "cuda/decode/stored.cuh"
#include "cuda/load/pages.cuh"
#include "cuda/tile/shared_tile.cuh"

namespace jax_flash::decode {

// The location of a sequence's keys and values: in pages, or contiguous, which is treated as one long page.
// kPolicy: copies tell L2 what it may evict first, which takes two registers.
template <class Stored, bool kPolicy>
struct KeySource {
  GlobalPages<Stored> key, value;
  const int32_t* table;
  int32_t page;  // the sequence's number; without pages also that of its one long page
  Interval used;
  ptx::L2Policy policy;

  __device__ __forceinline__ explicit KeySource(const DecodeCall& call)
      : policy(ptx::l2_policy(call.evicts_first)) {}

  __device__ __forceinline__ void open(const DecodeCall& call, const ColumnRows& rows,
                                       const SequenceWork& work) {
    key = pages_of(call, call.key, rows.kv_head, work.leading, call.head_dim);
    value = pages_of(call, call.value, rows.kv_head, work.leading, call.value_dim);
    page = work.index;
    used = work.keys;
    if (call.paged) table = call.block_tables.at<const int32_t>(work.leading, page, 0, 0);
  }
  // Looks up a key's page. check() reads the entry later, so that nobody waits for it here.
  __device__ __forceinline__ PageSlot look_up(const DecodeCall& call, int64_t position) const {
    return locate(call, position, [&](int32_t entry) { return table[entry]; });
  }
  // page_of(entry) gives the page of a table entry.
  template <class PageOf>
  __device__ __forceinline__ PageSlot locate(const DecodeCall& call, int64_t position, PageOf page_of) const {
    if (position < used.lo || position >= used.hi) return {kNoPage, kUnused};
    const int32_t key_index = static_cast<int32_t>(position);
    if (!call.paged) return {page, key_index};
    const int32_t entry = call.page_size.quotient(key_index);
    return {page_of(entry), key_index - entry * call.page_size.value};
  }
  __device__ __forceinline__ static PageSlot check(const DecodeCall& call, PageSlot found) {
    if (found.slot == kUnused) return {kNoPage, 0};
    if (static_cast<uint32_t>(found.page) >= static_cast<uint32_t>(call.pages)) return {kMissingPage, 0};
    return found;
  }

 private:
  static constexpr int32_t kUnused = -1;
  __device__ __forceinline__ static GlobalPages<Stored> pages_of(const DecodeCall& call,
                                                                 const DecodeView& pool, int32_t kv_head,
                                                                 int32_t leading, int32_t columns) {
    return {pool.at<const Stored>(leading, 0, kv_head, 0), pool.batch, pool.row, columns, call.kv_dtype};
  }
};

// One warp starts the copies of the keys and values in kRows slots. `slot`: the slot of key lane % kRows.
template <class KTile, class VTile, class Stored, bool kPolicy>
__device__ __forceinline__ void copy_rows(uint32_t shared, const KeySource<Stored, kPolicy>& from,
                                          PageSlot slot) {
  constexpr int kLanes = 32, kRows = KTile::kRows;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const auto copy = [&]<class Tile>(uint32_t to, const GlobalPages<Stored>& pages, bool nan_if_missing,
                                    bool checked) {
    const int64_t own = pages.offset(slot);
    const auto copy_one = [&](int i) {
      const int row = (i * kLanes + lane) / Tile::kChunks, chunk = (i * kLanes + lane) % Tile::kChunks;
      const int64_t offset = __shfl_sync(~0u, own, row);
      const Stored* const source = pages.data + offset + chunk * kChunk<Stored>;
      if (!checked) {
        if constexpr (kPolicy) return ptx::cp_async_16(to + Tile::offset(row, chunk), source, from.policy);
        return ptx::cp_async_16(to + Tile::offset(row, chunk), source);
      }
      const bool missing = nan_if_missing && offset == kMissingPage;
      ptx::cp_async_16(to + Tile::offset(row, chunk),
                       offset >= 0 ? static_cast<const void*>(source) : &kNanChunk,
                       (offset >= 0 || missing) && chunk * kChunk<Stored> < pages.columns);
    };
    if (checked) {
#pragma unroll 1
      for (int i = 0; i < kRows * Tile::kChunks / kLanes; ++i) copy_one(i);
    } else {
#pragma unroll
      for (int i = 0; i < kRows * Tile::kChunks / kLanes; ++i) copy_one(i);
    }
  };
  const uint32_t values = shared + KTile::kBytes;
  const bool padded = from.key.columns < KTile::kChunks * kChunk<Stored> ||
                      from.value.columns < VTile::kChunks * kChunk<Stored>;
  if (__all_sync(~0u, slot.page >= 0 && !padded)) {
    copy.template operator()<KTile>(shared, from.key, true, false);
    copy.template operator()<VTile>(values, from.value, false, false);
  } else {
    copy.template operator()<KTile>(shared, from.key, true, true);
    copy.template operator()<VTile>(values, from.value, false, true);
  }
}

// A segment whose keys are in the ring: its part of its sequence, and its tiles. It lies in shared memory.
struct Segment {
  SequenceWork work;
  Parts parts;
  int32_t tile, tile_end;
};
static_assert(sizeof(Segment) <= kDecodeSegmentBytes);

// A scale of keys and values that no page scales.
static __device__ const float kUnscaled = 1;

// kTile: keys in a tile of the whole block; each warp takes kKeys of them. Rows: ColumnRows, or a class of
// it. kPrefetchesTable: kernels with enough registers prefetch the table's entries of segments with at least
// kPrefetchedTiles, kStages tiles ahead. kPageScales: scales of pages are copied with their keys.
template <class Stored, int HeadDim, int ValueDim, int kStageCount, int kKeyCount, int kTile, bool kPolicy,
          bool kPrefetchesTable, bool kPageScales, class Rows>
class WarpRing {
 public:
  static constexpr int kKeys = kKeyCount, kStages = kStageCount;
  // Segments whose data may be needed at once: the one before, one for each stage, and the next.
  static constexpr int kSegments = kStages + 2;
  using KTile = StoredTile<Stored, kKeys, HeadDim>;
  using VTile = StoredTile<Stored, kKeys, ValueDim>;
  static constexpr int kStageBytes = KTile::kBytes + VTile::kBytes, kBytes = kStages * kStageBytes;
  static constexpr int kEntryBytes = kStages * kKeys * 4, kScaleBytes = 2 * kEntryBytes;
  static constexpr int kPrefetchedTiles = 32;

  // This warp's parts of shared memory are `shared` for the stages, `queue` for kSegments segments,
  // `page_memory` for table entries: int32 [kStages, kKeys], and `scale_memory` for the scales of pages:
  // float32 [kStages, 2, kKeys], of keys and of values.
  __device__ __forceinline__ WarpRing(uint32_t shared, uint32_t page_memory, uint32_t scale_memory,
                                      Segment* queue, const DecodeCall& decode, const Rows& column_rows,
                                      const Partition& of_column, const Range& range, int32_t range_number)
      : call(decode),
        rows(column_rows),
        partition(of_column),
        memory(shared),
        entries(page_memory + threadIdx.x % 32 % kKeys * 4),
        scale_stages(scale_memory),
        number(range_number),
        segments(queue),
        ahead(range),
        keys(decode) {}

  // Starts the copy of this warp's keys of the next tile, and looks up the pages of the tile after it. The
  // first call, and calls past the last tile, copy nothing.
  __device__ __forceinline__ void fill() {
    if (ahead.tile < ahead.tile_end) {
      if (kPrefetchesTable && prefetches && copied >= kStages)
        next = keys.locate(call, position(0, tiles()),
                           [&](int32_t) { return static_cast<int32_t>(ptx::load_shared(entry_of(filled))); });
      if (sees(tiles().at(ahead.tile))) {
        const PageSlot slot = keys.check(call, next);
        copy_rows<KTile, VTile>(memory + filled * kStageBytes, keys, slot);
        if (kPageScales && call.scaled_by_page) copy_scales(slot.page);
      }
      if (kPrefetchesTable && prefetches) copy_entry();
      ++ahead.tile, ++copied;
    }
    if (ahead.tile < ahead.tile_end) {
      if (!kPrefetchesTable || !prefetches || copied < kStages) find(tiles());
    } else if (!ahead.done()) {
      ahead.advance();
      if (!ahead.done()) open();
    }
    if (++filled == kStages) filled = 0;
    ptx::cp_async_commit();
  }
  // Waits for the oldest of kStages copies, and returns the address of the keys and their values.
  __device__ __forceinline__ uint32_t wait() const {
    ptx::cp_async_wait<kStages - 1>();
    __syncwarp();
    return memory + filled * kStageBytes;
  }
  // The scales of the keys that wait() has returned, if kPageScales and pages have scales.
  __device__ __forceinline__ uint32_t scales() const { return scale_stages + filled * (kKeys * 8); }
  // The next segment. The caller has waited for all copies of the segment before; the first copy of this one
  // has been started.
  __device__ __forceinline__ const Segment& next_segment() {
    const Segment& segment = segments[taken];
    if (++taken == kSegments) taken = 0;
    return segment;
  }
  __device__ __forceinline__ bool done() const { return ahead.done() && taken == opened; }

 private:
  __device__ __forceinline__ void open() {
    const SequenceWork work = ahead.open(call, rows);
    keys.open(call, rows, work);
    prefetches = kPrefetchesTable && call.paged && ahead.tile_end - ahead.tile >= kPrefetchedTiles,
    copied = 0;
    find(Tiles{call, work});
    __syncwarp();  // all lanes have read the segment that was stored here
    if (threadIdx.x % 32 == 0)
      segments[opened] = {work, Parts::of(call.grid, partition, ahead, number), ahead.tile, ahead.tile_end};
    if (++opened == kSegments) opened = 0;
    __syncwarp();
  }
  // The tiles of the last segment. They are read again, because registers are few.
  using Tiles = SeenTiles<kTile, Rows::kSkips>;
  __device__ __forceinline__ Tiles tiles() const {
    return {call, segments[opened > 0 ? opened - 1 : kSegments - 1].work};
  }
  // Whether some row sees some of this warp's keys of a tile.
  __device__ __forceinline__ static bool sees(const ListedTile& tile) {
    const int warp = static_cast<int>(threadIdx.x / 32);
    return !Rows::kSkips || tile.part<kTile / kKeys>(warp) != SeenPiece::kNone;
  }
  // The position of this lane's key in the i-th tile from the next one on.
  __device__ __forceinline__ int64_t position(int i, const Tiles& tiles) const {
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
    return int64_t{tiles.at(ahead.tile + i).number} * kTile + warp * kKeys + lane % kKeys;
  }
  __device__ __forceinline__ void find(const Tiles& tiles) { next = keys.look_up(call, position(0, tiles)); }
  __device__ __forceinline__ uint32_t entry_of(int stage) const { return entries + stage * kKeys * 4; }
  // Starts to copy the table entry for the tile that will use this stage next.
  __device__ __forceinline__ void copy_entry() const {
    if (threadIdx.x % 32 >= kKeys) return;
    (void)keys.locate(call, position(kStages, tiles()), [&](int32_t entry) {
      ptx::cp_async_4(entry_of(filled), keys.table + entry, true);
      return 0;
    });
  }

  // Starts to copy the scales of this lane's key and value, which lie on `page` unless it is negative.
  __device__ __forceinline__ void copy_scales(int32_t page) const {
    const int lane = static_cast<int>(threadIdx.x % 32);
    if (lane >= kKeys) return;
    const int32_t leading = tiles().work.leading;
    const auto copy = [&](uint32_t to, const DecodeView& scale) {
      const bool own = page >= 0 && scale.batch != 0;
      ptx::cp_async_4(to, own ? scale.at<const float>(leading, page, rows.kv_head, 0) : &kUnscaled, true);
    };
    copy(scales() + lane * 4, call.k_scale);
    copy(scales() + (kKeys + lane) * 4, call.v_scale);
  }

  const DecodeCall& call;
  const Rows& rows;
  const Partition& partition;
  uint32_t memory, entries;  // entries: address of this lane's entry for stage 0
  uint32_t scale_stages;
  int32_t number;  // number of the block's range
  Segment* segments;
  WorkIterator<kTile> ahead;        // at the tile that is copied next
  KeySource<Stored, kPolicy> keys;  // of that tile's sequence
  PageSlot next;                    // the page of this lane's key in that tile, not yet checked
  bool prefetches = false;          // whether the segment is looked up kStages tiles ahead
  int32_t copied = 0;               // tiles of the segment that have been copied
  int filled = 0;                   // the stage that is filled next
  int opened = 0, taken = 0;        // the segments that are opened and taken next
};

}  // namespace jax_flash::decode
