// How decode (decode.h) splits the keys of each sequence into work items. The split depends on the problem
// alone, and parts are merged in order, so that the number of threads does not change any bit of the
// result.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../core/split.h"
#include "kernels.h"
#include "plan.h"

namespace jax_flash {

class DecodePlan {
 public:
  struct Tile {
    RowTile rows;
    int64_t offset, part_floats;  // offset and size of the tile's partial outputs, in floats
  };

  struct Item {
    int32_t tile, part;  // part < 0: the item is the whole tile
  };

  DecodePlan(const Problem& p, const Starts& starts, const Kernels& kernels) : problem_(p) {
    if (p.heads == 0) return;
    for (int64_t l = 0; l < p.leading.count(); ++l) {
      for (int32_t z = 0; z < p.batch; ++z) add(l, z, starts, kernels.tile_m);
    }
    cut(kernels);
  }

  // Whether decode computes every query row, so that nothing is left for forward.h.
  bool covers_all_rows() const { return general_rows_ == 0; }
  const std::vector<Tile>& tiles() const { return tiles_; }
  const std::vector<Item>& items() const { return items_; }
  int64_t part_floats() const { return part_floats_; }
  int64_t workers() const { return static_cast<int64_t>(bytes_ / kBytesPerWorker) + 1; }

 private:
  static constexpr int64_t kTargetItems = 64;    // work items to aim at, more than there are threads
  static constexpr int64_t kSmallestPart = 256;  // keys
  static constexpr double kBytesPerWorker = 1 << 17;

  void add(int64_t leading, int32_t index, const Starts& starts, int32_t tile_rows) {
    const Problem& p = problem_;
    RowTile tile{};
    tile.leading = leading;
    tile.sequence = starts.sequence(p, leading, index);
    tile.begin = 0;
    tile.end = p.packed() ? tile.sequence.q_len : p.q_rows;
    if (!is_decode(p, tile.end)) {
      general_rows_ += tile.end;
      return;
    }
    const int32_t group = p.heads / p.kv_heads, rows = group * tile.end;
    // All heads of a token are contiguous in memory, except in "hnd" pages.
    const bool heads_apart = p.paged() && p.spec.page_layout == PageLayout::kHnd;
    const int32_t max_heads = heads_apart ? 1 : std::min(tile_rows / rows, p.kv_heads);
    for (int32_t x = 0; x < p.kv_heads; x += max_heads) {
      tile.head = x * group;
      tile.heads = std::min(max_heads, p.kv_heads - x) * group;
      tiles_.push_back({tile, 0, 0});
    }
    keys_ += keys_of(problem_, tile).size();
  }

  void cut(const Kernels& kernels) {
    const double key_bytes = double(problem_.head_dim + problem_.value_dim) * 4;
    for (size_t i = 0; i < tiles_.size(); ++i) {
      Tile& tile = tiles_[i];
      const Interval keys = keys_of(problem_, tile.rows);
      tile.rows.parts = parts(keys);
      tile.offset = part_floats_;
      tile.part_floats = kernels.part_floats(problem_, tile.rows);
      bytes_ += key_bytes * keys.size() * tile.rows.heads;
      const auto index = static_cast<int32_t>(i);
      const int64_t floats = tile.part_floats * tile.rows.parts;
      if (tile.rows.parts == 1 || part_floats_ + floats > kMaxPartFloats) {
        items_.push_back({index, -1});
        continue;
      }
      part_floats_ += floats;
      for (int32_t part = 0; part < tile.rows.parts; ++part) items_.push_back({index, part});
    }
  }

  int32_t parts(Interval keys) const {
    const AttentionSpec& s = problem_.spec;
    if (s.num_splits > 0) return clamp_splits(s.num_splits, keys);
    if (s.batch_invariant) return clamp_splits(ceil_div(keys.size(), kInvariantSplit), keys);
    return clamp_splits(keys.size() / std::max(kSmallestPart, keys_ / kTargetItems), keys);
  }

  const Problem& problem_;
  std::vector<Tile> tiles_;
  std::vector<Item> items_;
  int64_t keys_ = 0, part_floats_ = 0;  // keys_: visible keys of all sequences, counted once for all heads
  int64_t general_rows_ = 0;
  double bytes_ = 0;
};

}  // namespace jax_flash
