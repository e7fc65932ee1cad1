// A warp's own ring of keys and values in shared memory: no barrier of the block between copies and products.
//
// A stage holds 16 keys and their values. The slots of the next stage's keys are found while the one before
// it is copied, so that a block table costs nothing that is seen.
#pragma once

#include <cstdint>

#include "cuda/decode/schedule.cuh"
#include "cuda/decode/stored.cuh"
#include "cuda/load/pages.cuh"
#include "cuda/tile/shared_tile.cuh"

namespace jax_flash::decode {

// Where keys and values of a sequence lie: in pages, or side by side, which is one long page.
template <class Stored>
struct Keys {
  GlobalPages<Stored> key, value;
  PageTable table;
  int32_t page;  // without a table
  Interval used;

  __device__ __forceinline__ void open(const Problem& p, const Rows& rows, const Entry& entry) {
    key = pages_of<Stored>(p, p.key, entry.leading, rows.kv_head, p.head_dim);
    value = pages_of<Stored>(p, p.value, entry.leading, rows.kv_head, p.value_dim);
    page = entry.sequence.index;
    used = entry.keys;
    if (p.paged()) table = page_table(p.block_tables, p.leading, entry.leading, page, p.page_size, p.pages);
  }
  __device__ __forceinline__ PageSlot find(bool paged, int64_t j) const {
    if (j < used.lo || j >= used.hi) return {kNoPage, 0};
    const int32_t key_index = static_cast<int32_t>(j);
    if (!paged) return {page, key_index};
    const PageSlot found = table.at(key_index);
    return table.in_pool(found.page) ? found : PageSlot{kMissingPage, 0};
  }
};

// Starts the copy of 16 rows by one warp; lane l knows the offset of row l % 16, or what it is instead.
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

template <class Stored, int HeadDim, int ValueDim, int kStages, int kTile>
class WarpRing {
 public:
  static constexpr int kKeys = 16;
  using KTile = StoredTile<Stored, kKeys, HeadDim>;
  using VTile = StoredTile<Stored, kKeys, ValueDim>;
  static constexpr int kStageBytes = KTile::kBytes + VTile::kBytes, kBytes = kStages * kStageBytes;

  __device__ __forceinline__ WarpRing(uint32_t shared, const Call& decode, const Rows& column_rows,
                                      const Cursor<kTile>& range)
      : call(decode), rows(column_rows), memory(shared), ahead(range) {
    open();
#pragma unroll 1  // the start of a kernel waits for its instructions
    for (int i = 0; i < kStages; ++i) fill(i);
  }

  // The stage that holds this warp's keys of the next tile.
  __device__ __forceinline__ uint32_t wait() const {
    ptx::cp_async_wait<kStages - 1>();
    __syncwarp();
    return memory + stage * kStageBytes;
  }
  // It is read: its place is filled again.
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
        ahead.next();
        open();
      }
    }
    ptx::cp_async_commit();
  }

  const Call& call;
  const Rows& rows;
  uint32_t memory;
  Cursor<kTile> ahead;  // of the tile that is copied next
  Keys<Stored> keys;
  PageSlot next;  // of this lane's key in it
  int stage = 0;
};

}  // namespace jax_flash::decode
