// How a call is divided into work items. The division depends on the problem and the instruction set, never
// on the number of threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../core/problem.h"
#include "../core/sequence.h"
#include "../core/visible/ranges.h"
#include "kernels.h"

namespace jax_flash {

// The clamped cu_seqlens of every leading entry, [L, n + 1]. Only packed layouts have them; with pages only
// those of the queries exist.
struct Starts {
  std::vector<int32_t> q, k;
  int64_t entries = 0;  // n + 1

  explicit Starts(const Problem& p) {
    if (!p.packed()) return;
    entries = int64_t{p.batch} + 1;
    const int64_t leading = p.leading.count();
    q.resize(leading * entries);
    if (p.varlen()) k.resize(leading * entries);
    for (int64_t l = 0; l < leading; ++l) {
      read(p, p.cu_seqlens_q, l, p.q_rows, q);
      if (p.varlen()) read(p, p.cu_seqlens_k, l, p.k_rows, k);
    }
  }

  // The rows of the longest sequence of any leading entry.
  static int32_t longest(const std::vector<int32_t>& starts) {
    int32_t rows = 0;
    for (size_t i = 0; i + 1 < starts.size(); ++i) rows = std::max(rows, starts[i + 1] - starts[i]);
    return rows;
  }

  const int32_t* q_of(int64_t leading) const { return q.data() + leading * entries; }
  const int32_t* k_of(int64_t leading) const { return k.data() + leading * entries; }

  // A batch entry or sequence of the problem that these are the starts of.
  Sequence sequence(const Problem& p, int64_t leading, int32_t index) const {
    if (!p.packed()) return fixed_sequence(p, leading, index);
    return p.paged() ? paged_sequence(p, leading, index, q_of(leading))
                     : varlen_sequence(p, leading, index, q_of(leading), k_of(leading));
  }

 private:
  void read(const Problem& p, const View& view, int64_t leading, int32_t rows,
            std::vector<int32_t>& to) const {
    const int32_t* from = view.as<const int32_t>() + view.leading_offset(p.leading, leading);
    clamp_starts(from, view.batch, p.batch, rows, to.data() + leading * entries);
  }
};

// The keys that the rows of a tile see through band and ranges.
inline Interval keys_of(const Problem& p, const RowTile& tile) {
  return seen_by_any(make_band(p, tile.leading, tile.sequence),
                     row_ranges(p, tile.leading, tile.sequence, tile.head),
                     {tile.begin, tile.end, tile.heads}, {0, tile.sequence.k_len});
}

// Limit of the memory for partial outputs of tiles whose keys are split among threads. Tiles that exceed it
// run on one thread, part after part.
inline constexpr int64_t kMaxPartFloats = int64_t{1} << 22;

enum class GridRows { kAll, kPrefill };  // kPrefill: without the rows that decode takes

// All query tiles. A tile has rows of all heads that read one KV head, or of as many of them as fit in it.
// The tiles of such heads are contiguous, in descending order: with causal the last one has the most keys.
class RowGrid {
 public:
  RowGrid(const Problem& p, const Starts& starts, GridRows rows, int32_t tile)
      : problem_(p), starts_(starts), prefill_(rows == GridRows::kPrefill), tile_(tile), heads_(p.heads) {
    if (p.heads > 0) {
      const int32_t group = p.heads / p.kv_heads;
      chunks_ = static_cast<int32_t>(ceil_div(group, tile));
      chunk_ = std::min(group, tile);
      heads_ = p.kv_heads * chunks_;
      tile_ = tile / chunk_;
    }
    if (p.packed()) {
      slots_ = p.batch > 0 ? slot_count(p.q_rows, tile_, p.batch) : 0;
    } else {
      per_entry_ = ceil_div(p.q_rows, tile_);
      slots_ = p.batch * per_entry_;
    }
  }

  // Slots per head of a leading entry; packed layouts leave some empty.
  int64_t slots() const { return slots_; }
  int64_t heads() const { return heads_; }
  int64_t size() const { return problem_.leading.count() * heads_ * slots_; }

  // Returns false for a slot without rows.
  bool at(int64_t index, RowTile& item) const {
    const int64_t slot = slots_ - 1 - index % slots_;
    set_heads(static_cast<int32_t>(index / slots_ % heads_), item);
    item.leading = index / slots_ / heads_;
    return problem_.packed() ? packed(slot, item) : fixed(slot, item);
  }

 private:
  void set_heads(int32_t index, RowTile& item) const {
    const int32_t group = problem_.heads / problem_.kv_heads, first = index % chunks_ * chunk_;
    item.head = index / chunks_ * group + first;
    item.heads = std::min(chunk_, group - first);
  }

  bool fixed(int64_t slot, RowTile& item) const {
    item.sequence = starts_.sequence(problem_, item.leading, static_cast<int32_t>(slot / per_entry_));
    if (prefill_ && is_decode(problem_, problem_.q_rows)) return false;
    return rows(slot % per_entry_, problem_.q_rows, item);
  }

  bool packed(int64_t slot, RowTile& item) const {
    const int32_t* own = starts_.q_of(item.leading);
    if (slot < first_slot(own[0], tile_, 0)) return false;
    const int32_t z = sequence_of_slot(own, problem_.batch, tile_, slot);
    item.sequence = starts_.sequence(problem_, item.leading, z);
    if (prefill_ && is_decode(problem_, own[z + 1] - own[z])) return false;
    return rows(slot - first_slot(own[z], tile_, z), own[z + 1] - own[z], item);
  }

  bool rows(int64_t tile, int32_t count, RowTile& item) const {
    if (tile * tile_ >= count) return false;
    item.begin = static_cast<int32_t>(tile * tile_);
    item.end = static_cast<int32_t>(std::min<int64_t>(count, (tile + 1) * tile_));
    return true;
  }

  const Problem& problem_;
  const Starts& starts_;
  bool prefill_;
  int32_t tile_, heads_;
  // A KV head's query heads are cut into chunks: their number, and the heads of each.
  int32_t chunks_ = 1, chunk_ = 1;
  int64_t slots_ = 0, per_entry_ = 0;
};

// The backward's work items: each is a tile of keys at one query head. A unit is one sequence at one query
// head; its items add to the same dQ. The units of a KV head are consecutive and add to the same dK and dV.
class KeyGrid {
 public:
  struct Item {
    int32_t unit, tile;
  };

  KeyGrid(const Problem& p, const Starts& starts, int32_t tile)
      : problem_(p), starts_(starts), tile_(tile), group_(p.heads > 0 ? p.heads / p.kv_heads : 1) {}

  int64_t units() const { return problem_.leading.count() * problem_.heads * problem_.batch; }
  int32_t group() const { return group_; }

  // The number of items of a unit. It is at least one: the first item also zeros the gradients of a unit
  // without keys.
  int32_t items(int64_t unit) const {
    return static_cast<int32_t>(std::max<int64_t>(1, ceil_div(key_rows(unit), tile_)));
  }

  // The order in which threads claim items. An item waits only for earlier ones, so there is no deadlock. The
  // items of `width` units alternate, so that a thread seldom waits for another.
  std::vector<Item> schedule(int64_t width) const {
    std::vector<Item> list;
    for (int64_t first = 0; first < units(); first += width) {
      const int64_t end = std::min(first + width, units());
      bool any = true;
      for (int32_t tile = 0; any; ++tile) {
        any = false;
        for (int64_t unit = first; unit < end; ++unit) {
          if (tile >= items(unit)) continue;
          list.push_back({static_cast<int32_t>(unit), tile});
          any = true;
        }
      }
    }
    return list;
  }

  RowTile at(Item item) const {
    const Where w = where(item.unit);
    RowTile tile;
    tile.leading = w.leading;
    tile.head = w.head;
    tile.sequence = starts_.sequence(problem_, w.leading, w.sequence);
    tile.begin = item.tile * tile_;
    tile.end = static_cast<int32_t>(std::min<int64_t>(key_rows(item.unit), tile.begin + tile_));
    return tile;
  }

 private:
  struct Where {
    int64_t leading;
    int32_t head, sequence;
  };

  Where where(int64_t unit) const {
    const int64_t g = unit % group_, z = unit / group_ % problem_.batch, kv = unit / group_ / problem_.batch;
    return {kv / problem_.kv_heads, static_cast<int32_t>(kv % problem_.kv_heads * group_ + g),
            static_cast<int32_t>(z)};
  }

  int64_t key_rows(int64_t unit) const {
    if (!problem_.packed()) return problem_.k_rows;
    const Where w = where(unit);
    const int32_t* k = starts_.k_of(w.leading) + w.sequence;
    return k[1] - k[0];
  }

  const Problem& problem_;
  const Starts& starts_;
  int32_t tile_, group_;
};

// All tiles of dbias. A tile is a strip of up to kBiasStrip query tiles, because keys are packed once per
// strip; strips are shorter where there would be fewer than kItems of them.
class BiasGrid {
 public:
  BiasGrid(const Problem& p, int32_t tile_m, int32_t tile_n) : p_(p), m_(tile_m), n_(tile_n) {
    columns_ = ceil_div(p.dbias_columns, tile_n);
    rows_ = ceil_div(p.dbias_rows, tile_m);
    m_ *= std::clamp<int64_t>(size() / kItems, 1, kBiasStrip);
    rows_ = ceil_div(p.dbias_rows, m_);
  }

  int64_t size() const { return p_.leading.count() * p_.dbias_batch * p_.dbias_heads * rows_ * columns_; }

  BiasTile at(int64_t index) const {
    BiasTile t;
    const int64_t column = index % columns_, row = (index /= columns_) % rows_;
    t.head = static_cast<int32_t>((index /= rows_) % p_.dbias_heads);
    t.batch = static_cast<int32_t>((index /= p_.dbias_heads) % p_.dbias_batch);
    t.leading = index / p_.dbias_batch;
    t.row_begin = static_cast<int32_t>(row * m_);
    t.row_end = static_cast<int32_t>(std::min<int64_t>(p_.dbias_rows, (row + 1) * m_));
    t.column_begin = static_cast<int32_t>(column * n_);
    t.column_end = static_cast<int32_t>(std::min<int64_t>(p_.dbias_columns, (column + 1) * n_));
    return t;
  }

 private:
  static constexpr int64_t kItems = 64;

  const Problem& p_;
  int64_t m_, n_, rows_, columns_;
};

}  // namespace jax_flash
