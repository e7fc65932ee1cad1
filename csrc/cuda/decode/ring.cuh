// A ring of key and value tiles in shared memory that belongs to one warp, which both fills and reads it:
// copies and products need no barrier across the thread block.
//
// A stage holds 16 keys and their values. The page slots of the next stage's keys are looked up while the
// last copy runs, which hides the latency of the block table.
#pragma once

#include <cstdint>

#include "cuda/decode/partition.cuh"
#include "cuda/decode/stored.cuh"
#include "cuda/load/pages.cuh"
#include "cuda/tile/shared_tile.cuh"

namespace jax_flash::decode {

// Where the keys and values of a sequence lie: in pages, or contiguously, which is treated as one long page.
template <class Stored>
struct KeySource {
  GlobalPages<Stored> key, value;
  PageTable table;
  int32_t page;  // the one page of a dense sequence
  Interval used;

  __device__ __forceinline__ void open(const Problem& p, const ColumnRows& rows, const SequenceWork& work) {
    key = pages_of<Stored>(p, p.key, work.leading, rows.kv_head, p.head_dim);
    value = pages_of<Stored>(p, p.value, work.leading, rows.kv_head, p.value_dim);
    page = work.sequence.index;
    used = work.keys;
    if (p.paged()) table = page_table(p.block_tables, p.leading, work.leading, page, p.page_size, p.pages);
  }
  __device__ __forceinline__ PageSlot find(bool paged, int64_t position) const {
    if (position < used.lo || position >= used.hi) return {kNoPage, 0};
    const int32_t key_index = static_cast<int32_t>(position);
    if (!paged) return {page, key_index};
    return table.lookup(key_index);
  }
};

// Starts the copy of 16 rows by one warp. `slot` is where row lane % 16 lies.
template <class Tile, bool kNanIfMissing, class Stored>
__device__ __forceinline__ void copy_rows(uint32_t shared, const GlobalPages<Stored>& from, PageSlot slot) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int64_t own = from.offset(slot);
#pragma unroll
  for (int i = 0; i < Tile::kRows * Tile::kChunks / 32; ++i) {
    const int row = (i * 32 + lane) / Tile::kChunks, chunk = (i * 32 + lane) % Tile::kChunks;
    const int64_t offset = __shfl_sync(~0u, own, row);
    const bool used = offset >= 0 || (kNanIfMissing && offset == kMissingPage);
    const void* source =
        offset >= 0 ? static_cast<const void*>(from.data + offset + chunk * kChunk<Stored>) : &kNanChunk;
    ptx::cp_async_16(shared + Tile::offset(row, chunk), source,
                     used && chunk * kChunk<Stored> < from.columns);
  }
}

// kTile: keys of a tile of the whole block, of which each warp takes kKeys.
template <class Stored, int HeadDim, int ValueDim, int kStages, int kTile>
class WarpRing {
 public:
  static constexpr int kKeys = 16;
  using KTile = StoredTile<Stored, kKeys, HeadDim>;
  using VTile = StoredTile<Stored, kKeys, ValueDim>;
  static constexpr int kStageBytes = KTile::kBytes + VTile::kBytes, kBytes = kStages * kStageBytes;

  __device__ __forceinline__ WarpRing(uint32_t shared, const Call& decode, const ColumnRows& column_rows,
                                      const WorkIterator<kTile>& range)
      : call(decode), rows(column_rows), memory(shared), ahead(range) {
    open();
#pragma unroll 1  // a kernel's first instructions are fetched from memory, so the prologue is kept short
    for (int i = 0; i < kStages; ++i) fill(i);
  }

  // Waits for the stage with this warp's keys of the next tile, and returns its address.
  __device__ __forceinline__ uint32_t wait() const {
    ptx::cp_async_wait<kStages - 1>();
    __syncwarp();
    return memory + stage * kStageBytes;
  }
  // Releases that stage, which is filled again.
  __device__ __forceinline__ void release() {
    __syncwarp();
    fill(stage);
    if (++stage == kStages) stage = 0;
  }

 private:
  __device__ __forceinline__ void open() {
    if (ahead.done()) return;
    keys.open(call.p, rows, ahead.open(call, rows));
    find();
  }
  __device__ __forceinline__ void find() {
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
    next = keys.find(call.p.paged(), int64_t{ahead.tile} * kTile + warp * kKeys + lane % kKeys);
  }
  __device__ __forceinline__ void fill(int to) {
    if (!ahead.done()) {
      const uint32_t shared = memory + to * kStageBytes;
      copy_rows<KTile, true>(shared, keys.key, next);
      copy_rows<VTile, false>(shared + KTile::kBytes, keys.value, next);
      if (++ahead.tile < ahead.tile_end) {
        find();
      } else {
        ahead.advance();
        open();
      }
    }
    ptx::cp_async_commit();
  }

  const Call& call;
  const ColumnRows& rows;
  uint32_t memory;
  WorkIterator<kTile> ahead;  // at the tile that is copied next
  KeySource<Stored> keys;     // of that tile's sequence
  PageSlot next;              // of this lane's key in that tile
  int stage = 0;
};

}  // namespace jax_flash::decode
