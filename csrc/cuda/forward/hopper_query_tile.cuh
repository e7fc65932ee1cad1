// The state of a query tile of cuda/forward/hopper.cuh: its work, its key tiles, and where its operands lie.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/plan/launch_plan.h"
#include "cuda/epilogue.cuh"
#include "cuda/forward/hopper_heads.cuh"
#include "cuda/hopper/band.cuh"
#include "cuda/hopper/roles.cuh"
#include "cuda/load/page_scales.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/score/operands.cuh"
#include "cuda/slices.cuh"
#include "cuda/tile/copy.cuh"
#include "cuda/work.cuh"

namespace jax_flash {

// The key tiles of one consumer. Numbers of tiles leave out those of a gap (GapOfTiles).
struct ConsumerKeys {
  Interval tiles;  // tiles in which any of its rows sees a key
  Interval whole;  // tiles in which all of its rows see all keys, unless empty
  int32_t end;     // one past the last key that any of its rows sees
};

// Where a consumer's rows lie, counted from the first consumer's, and what is staged per key tile.
struct NeighbouringRows {
  __device__ __forceinline__ static int32_t rows_before(int consumer) { return consumer * kConsumerRows; }
  __device__ __forceinline__ static int32_t heads_before(int) { return 0; }
  template <int kStages>
  struct Pieces {};
};

// The words of a boolean mask (MaskWords): those of the tile of the first rows and keys, and strides to those
// of further ones.
struct MaskOfTile {
  const uint32_t* mask_words;
  int64_t words_of_rows;
  int32_t words_of_keys;

  __device__ __forceinline__ void find_words(const MaskWords& words, const BlockWork& work) {
    const TileWork& tile = work.tile;
    mask_words = words.tile(work.leading, tile.index, work.head, tile.row / kRowBlock, 0);
    words_of_rows = words.row * MaskWords::kOfTile;
    words_of_keys = words.column * MaskWords::kOfTile;
  }
};
struct NoMaskOfTile {
  __device__ __forceinline__ void find_words(const MaskWords&, const BlockWork&) {}
};

// Additional state of kernels that go through lists.
template <int kConsumers>
struct ListOfTile : GapOfTiles<false>, MaskOfTile {
  static constexpr int32_t kNoRows = 1 << 28;  // rows_before() of a consumer without rows
  const KeyPieces* list;                       // of the key tiles
  int32_t keys_of_piece;
  int32_t rows[kConsumers], heads[kConsumers];
  Interval keys_in_band[kConsumers];  // with a boolean mask: that the band shows to all rows of a consumer

  __device__ __forceinline__ int32_t rows_before(int consumer) const { return rows[consumer]; }
  __device__ __forceinline__ int32_t heads_before(int consumer) const { return heads[consumer]; }
  // K of a tile is loaded before V of the previous tile, whose stage all consumers have released by then.
  template <int kStages>
  struct Pieces {
    KeyPieces of[kStages + 2];
    __device__ __forceinline__ KeyPieces& of_use(uint32_t use) { return of[use % (kStages + 2)]; }
    __device__ __forceinline__ const KeyPieces& of_use(uint32_t use) const { return of[use % (kStages + 2)]; }
  };
};

// Additional state of kernels of score kind Ranges.
template <int kConsumers>
struct RangesOfTile : NeighbouringRows, GapOfTiles<true> {
  int32_t first_key;  // of the sequence: the tile's keys begin with it
  Interval in_band;   // the band shows keys [i + lo, i + hi) of the sequence to row i
  // For each consumer, a second interval of tiles in which all its rows see all keys. It lies before the one
  // in ConsumerKeys, because rows may have two ranges.
  Interval first_whole[kConsumers];
  SeenByBlock blocks[kConsumers];  // each consumer's, copied before they are needed
};
// Additional state of all others. kGap: whether ranges or a mask may leave a gap between the key tiles.
template <bool kGap>
struct RowsOfTile : NeighbouringRows, GapOfTiles<kGap>, std::conditional_t<kGap, MaskOfTile, NoMaskOfTile> {};

// The same over float8 pages.
template <bool kGap>
struct ScaledRowsOfTile : RowsOfTile<kGap> {
  float key_scale;      // for the softmax's scale: 1 if S is multiplied by the scales of its keys,
  int32_t scales_keys;  // as this says
  float value_scale;    // 1 if each page has a scale
};

// Which columns of V and O a CTA works on, if not on all: those of a slice or, in a cluster whose CTAs share
// the tile, of its rank. Slices of a query tile have consecutive numbers, because they read the same Q and K.
struct SliceOfTile {
  int32_t column;  // first column

  // The tile that has this number, or a slice of it.
  template <class C>
  __device__ __forceinline__ uint32_t take(const Problem& p, uint32_t number) {
    if constexpr (C::kSharers > 1) {
      column = static_cast<int32_t>(ptx::cluster_rank()) * C::kSliceColumns;
      return number;
    }
    const uint32_t slices = slice_count<C>(p.value_dim);
    column = static_cast<int32_t>(number % slices) * C::kSliceColumns;
    return number / slices;
  }
};
struct NoSliceOfTile {};

// The state of a query tile that producers and consumers read. The tile scheduler's thread writes it, in
// three parts.
template <class T, int kConsumers, class Ranges, class Slice>
struct TileState : Ranges, Slice {
  BlockWork work;
  Band band;
  ScoreOperands score;
  Interval tiles;  // key tiles in which any row sees a key; in a cluster, any row of its CTAs
  ConsumerKeys keys[kConsumers];
  GlobalRows<T> out;
  LseRows lse;
  int32_t last_values;  // rows of V's last tile to read, if other tokens follow them in the operand
  int32_t one_segment;  // exactly the keys of `tiles` that the band leaves are visible
  int32_t done;         // all query tiles are taken, and this state describes none

  // Finds the part that the load warp needs, from `work`. Returns false if the tile has no rows.
  template <class C>
  __device__ __forceinline__ bool begin(const Problem& p, const TileSegments& segments) {
    const TileWork& tile = work.tile;
    if (tile.row >= tile.end) return false;
    find_band(p, work, band);
    reload_shared();
    if constexpr (C::kPacksHeads) limit_packed_band(p, tile.row, tile.used_queries(), band);
    if constexpr (C::kBeginsAtFirstKey) begin_at(band.rows(tile.row, tile.used_queries()).lo);
    if constexpr (!C::kListed) tiles = tiles_of(band.rows(tile.row, tile.used_queries()), C::kN);
    reload_shared();
    if constexpr (C::kTrims) trim<C>(p, segments);
    if constexpr (C::kKind == ScoreKind::kRanges) trim_to_ranges<C>(p, segments);
    if constexpr (C::kListed) take_list<C>(p, segments.lists);
    if constexpr (C::Score::reads(Operand::kMask) || C::kKind == ScoreKind::kListedMask)
      this->find_words(segments.words, work);
    if constexpr (C::kMulticast > 1) {
      work.tile.row += static_cast<int32_t>(ptx::cluster_rank()) * C::kM;
      work.tile.end = min(work.tile.end, work.tile.row + C::kM);
      reload_shared();
    }
    done = 0;
    return true;
  }

  // Finds the part that the consumers need.
  template <class C>
  __device__ __forceinline__ void prepare(const Problem& p, const TileSegments& segments) {
    const TileWork& tile = work.tile;
    if constexpr (C::kKind == ScoreKind::kRanges) prepare_blocks<C>();
#pragma unroll 1
    for (int i = 0; C::kListed && i < kConsumers; ++i) {
      const int32_t first = tile.row + this->rows_before(i), end = tile.used_queries();
      keys[i].tiles = first < end ? tiles : Interval{tiles.lo, tiles.lo};
      if constexpr (C::kKind == ScoreKind::kListedMask)
        this->keys_in_band[i] = band.common(first, min(first + kConsumerRows, end));
    }
#pragma unroll 1
    for (int i = 0; C::kKind != ScoreKind::kRanges && !C::kListed && i < kConsumers; ++i) {
      const int32_t first = tile.row + i * kConsumerRows;
      const int32_t last = min(first + kConsumerRows, tile.used_queries());
      Interval own = intersect(this->close(tiles_of(band.rows(first, last), C::kN)), tiles);
      if constexpr (C::kTrims)
        if (segments.part_keys && !one_segment && first < last)
          own = intersect(own, this->close(tiles_of(keys_of_part<C>(p, segments, first), C::kN)));
      keys[i].tiles = own.empty() ? Interval{tiles.lo, tiles.lo} : own;
      reload_shared();
      keys[i].end = band.rows(first, last).hi;
      reload_shared();
      Interval all;
      if constexpr (C::kPacksHeads) {
        all = common_of_packed(p, band, first, last);
      } else {
        all = band.common(first, last);
      }
      keys[i].whole = this->close({(all.lo + C::kN - 1) / C::kN, all.hi / C::kN});
    }
    reload_shared();
    if constexpr (!C::kListed) last_values = C::kN;
    if (!C::kListed && tile.k_begin + tile.k_len < p.k_rows)
      last_values = min(C::kN, tile.k_len - this->tile(tiles.hi - 1) * C::kN);
    reload_shared();
    if constexpr (C::kWidens) {
      const float scale = scale_of_pool(p, p.k_scale, work.leading, p.kv_head(work.head));
      this->scales_keys = has_page_scales(p.k_scale) || !C::Score::kScalesInSoftmax || !(scale > 0);
      this->key_scale = this->scales_keys ? 1 : scale;
    }
    if constexpr (C::kKind != ScoreKind::kPlain)
      score.template prepare<typename C::Score>(reload(p), work, work.head);
  }

  // Finds the part that the consumers' epilogue needs.
  __device__ __forceinline__ void prepare_outputs(const Problem& p) {
    out = {p.out.as<T>() + offset(p.out), p.out.row, p.value_dim};
    if constexpr (std::is_same_v<Slice, SliceOfTile>) {
      out.data += this->column;
      out.columns -= this->column;
    }
    reload_shared();
    lse.data = p.lse.as<float>() + offset(p.lse);
    reload_shared();
    lse.stride = p.lse.row;
    lse.sinks = nullptr;
    reload_shared();
    if (p.sinks) lse.sinks = p.sinks.as<const float>() + offset(p.sinks);
    if constexpr (requires { this->value_scale; })
      this->value_scale = scale_of_pool(p, p.v_scale, work.leading, p.kv_head(work.head));
  }

 private:
  // Makes the keys from `first` on a sequence of their own.
  __device__ __forceinline__ void begin_at(int32_t first) {
    work.tile.k_begin += first, work.tile.k_len -= first;
    band.shift -= first, band.k_len -= first;
    reload_shared();
  }
  // Restricts the tile to the keys that segments leave visible. If all are of the rows' own segment, and the
  // score does not depend on positions, they become a sequence in which only the band hides keys.
  template <class C>
  __device__ __forceinline__ void trim(const Problem& p, const TileSegments& segments) {
    one_segment = false;
    this->set_gap({0, 0}, C::kN);
    if (!segments.keys) return;
    if constexpr (C::kGap) {  // packed sequences may have ranges, too
      if (work.tile.index == kNoSequence) return;
      const int64_t slot = slot_of_tile<Over::kQueries>(p, work, C::kM);
      reload_shared();
      const SeenByTile seen = seen_of_slot(p, segments.keys, slot);
      this->set_gap(seen.gap, C::kN);
      tiles = this->close(tiles_of(seen.any, C::kN));
      return reload_shared();
    }
    const auto tiles_of_entry = static_cast<int32_t>(ceil_div(p.q_rows, C::kM));
    const int64_t at = (work.leading * p.batch + work.batch_row) * tiles_of_entry + work.tile.row / C::kM;
    Interval seen = segments.keys[at];
    if constexpr (C::kKind == ScoreKind::kSegments) {
      if (segments.one_segment[at]) {
        one_segment = true;
        work.tile.k_begin += seen.lo, work.tile.k_len -= seen.lo;
        band.shift -= seen.lo, band.k_len = seen.size();
        seen = {0, seen.size()};
      }
    }
    tiles = tiles_of(seen, C::kN);
    reload_shared();
  }
  // Restricts the tile to the keys from the first to the last that ranges and the band leave visible.
  template <class C>
  __device__ __forceinline__ void trim_to_ranges(const Problem& p, const TileSegments& segments) {
    tiles = {0, 0};
    if (work.tile.index == kNoSequence) return;
    copy_blocks(p, segments);
    const int64_t slot = slot_of_rows(p, C::kM);
    reload_shared();
    const SeenByTile& seen = segments.tiles[slot + work.tile.row / C::kM];
    const int32_t first = this->first_key = C::kTilesBeginAtAnyKey ? seen.any.lo : 0;
    this->set_gap({seen.gap.lo - first, seen.gap.hi - first}, C::kN);
    reload_shared();
    tiles = this->close(tiles_of({C::kTilesBeginAtAnyKey ? 0 : seen.any.lo, seen.any.hi - first}, C::kN));
    reload_shared();
    begin_at(first);
    constexpr int64_t kMost = 1 << 30;  // kMost and −kMost stand for no limit
    this->in_band.lo = static_cast<int32_t>(max(-kMost, min(kMost, band.shift - band.left)));
    reload_shared();
    this->in_band.hi = static_cast<int32_t>(max(-kMost, min(kMost, band.shift + band.right + 1)));
  }
  // Takes the key tiles that the mask and the band leave to the tile in a slot, work.head.
  template <class C>
  __device__ __forceinline__ void take_list(const Problem& p, const KeyLists& lists) {
    const uint32_t number = work.head, kv_head = number / lists.of_group;
    const uint32_t entry = static_cast<uint32_t>(work.leading) * p.batch + work.batch_row;
    const uint32_t listed = min(number, static_cast<uint32_t>(lists.listed - 1));
    const int64_t at = (entry * static_cast<uint32_t>(lists.listed) + listed) * lists.query_tiles +
                       static_cast<uint32_t>(work.tile.row) / lists.rows;
    reload_shared();
    const KeyList& own = lists.lists[at];
    tiles = {0, own.tiles}, last_values = own.last_values;
    reload_shared();
    this->list = lists.tiles + at * lists.most;
    this->keys_of_piece = lists.keys;
    reload_shared();
    const int32_t slot = static_cast<int32_t>(number - kv_head * lists.of_group);
    const KeyLists::Part first = lists.part(slot, 0);
    work.head = static_cast<int32_t>(kv_head) * lists.group + first.head;
    work.tile.row += first.row;
    reload_shared();
#pragma unroll 1
    for (int i = 0; i < kConsumers; ++i) {
      const KeyLists::Part part = lists.part(slot, i);
      this->rows[i] = part.head < lists.group ? part.row - first.row : this->kNoRows;
      this->heads[i] = part.head - first.head;
    }
    reload_shared();
  }
  // Starts to copy the entries of the consumers' blocks from the table, whose latency would add up otherwise.
  __device__ __forceinline__ void copy_blocks(const Problem& p, const TileSegments& segments) {
    const SeenByBlock* const from = segments.blocks + slot_of_rows(p, kRowBlock) + work.tile.row / kRowBlock;
#pragma unroll
    for (int i = 0; i < kConsumers; ++i) {
      if (work.tile.row + i * kConsumerRows >= work.tile.used_queries()) continue;
      const uint32_t to = ptx::shared_address(&this->blocks[i]);
      ptx::cp_async_16(to, from + i);
      ptx::cp_async_16(to + 16, reinterpret_cast<const uint4*>(from + i) + 1);
    }
    ptx::cp_async_commit();
    reload_shared();
  }
  // Restricts each consumer to the keys that its block sees.
  template <class C>
  __device__ __forceinline__ void prepare_blocks() {
    ptx::cp_async_wait<0>();
#pragma unroll 1
    for (int i = 0; i < kConsumers; ++i) {
      reload_shared();
      const int32_t row = work.tile.row + i * kConsumerRows;
      keys[i].tiles = {tiles.lo, tiles.lo};
      if (work.tile.index == kNoSequence || row >= work.tile.used_queries()) continue;
      const SeenByBlock& block = this->blocks[i];
      if (block.any.empty()) continue;
      const int32_t first = this->first_key;
      keys[i].tiles = this->close(tiles_of({block.any.lo - first, block.any.hi - first}, C::kN));
      keys[i].end = block.any.hi - first;
      reload_shared();
      this->first_whole[i] = whole_tiles<C>(block.whole[0], first);
      reload_shared();
      keys[i].whole = whole_tiles<C>(block.whole[1], first);
    }
  }
  // The whole tiles of an interval of keys, with tiles that begin with key `first`.
  template <class C>
  __device__ __forceinline__ Interval whole_tiles(const Interval& keys, int32_t first) const {
    const Interval inner{(keys.lo - first + C::kN - 1) / C::kN, (keys.hi - first) / C::kN};
    return inner.empty() ? Interval{0, 0} : this->close(inner);
  }
  __device__ __forceinline__ int64_t slot_of_rows(const Problem& p, int32_t block) const {
    return first_slot_of(p, work.leading, work.tile.index, work.tile.q_begin, p.q_rows, block);
  }
  // The keys that segments and ranges leave visible to kSegmentPart rows.
  template <class C>
  __device__ __forceinline__ Interval keys_of_part(const Problem& p, const TileSegments& segments,
                                                   int32_t row) const {
    if constexpr (C::kGap)
      return seen_of_slot(p, segments.part_keys, slot_of_rows(p, kSegmentPart) + row / kSegmentPart).any;
    const auto parts = static_cast<int32_t>(ceil_div(p.q_rows, kSegmentPart));
    return segments.part_keys[(work.leading * p.batch + work.batch_row) * parts + row / kSegmentPart];
  }
  // The offset of the sequence's first row. There is at most one leading dimension.
  __device__ __forceinline__ int64_t offset(const View& view) const {
    return work.leading * view.leading[0] + view.offset(work.batch_row, work.head, work.tile.q_begin);
  }
};

}  // namespace jax_flash
