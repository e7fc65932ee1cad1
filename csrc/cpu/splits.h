// How the keys of forward's tiles are cut, so that a few long sequences keep all threads busy. The partition,
// and with it every bit of the result, depends on the problem alone: parts merged in order by one thread or
// by many give the same.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../core/band.h"
#include "../core/split.h"
#include "plan.h"

namespace jax_flash {

class Splits {
 public:
  Splits(const Problem& p, const RowGrid& grid) : problem_(p), grid_(grid) {
    const int64_t per_entry = grid.slots() * grid.heads();
    double total = 0;  // of one head of every leading entry
    for (int64_t l = 0; l < p.leading.count(); ++l) {
      for (int64_t slot = 0; slot < grid.slots(); ++slot) {
        RowTile tile;
        if (grid.at(l * per_entry + slot, tile)) total += cost(tile, keys_of(tile));
      }
    }
    total_ = total * static_cast<double>(grid.heads());
    fair_ = total_ / kUnits;
  }

  // Multiply-adds of the whole call, about, per feature of a key and its value.
  double cost() const { return total_; }

  // The tile at `index` with its number of parts; false for a slot without rows.
  bool at(int64_t index, RowTile& tile) const {
    if (!grid_.at(index, tile)) return false;
    const Interval keys = keys_of(tile);
    const AttentionSpec& s = problem_.spec;
    if (s.num_splits > 0) {
      tile.parts = clamp_splits(s.num_splits, keys);
    } else if (s.batch_invariant) {
      tile.parts = clamp_splits(ceil_div(keys.size(), kInvariantSplit), keys);
    } else {
      const double fair_keys = std::max<double>(kSmallestPart, fair_ / cost_of_key(tile));
      tile.parts = clamp_splits(static_cast<int64_t>(keys.size() / fair_keys), keys);
    }
    return true;
  }

  // A tile whose parts are items of their own, for it is more than one unit's share.
  bool spread(const RowTile& tile) const { return tile.parts > 1 && cost(tile, keys_of(tile)) > fair_; }

 private:
  static constexpr double kUnits = 64;          // shares that the work is cut into, more than threads
  static constexpr double kSmallestPart = 512;  // keys
  static constexpr double kCostOfLoading = 8;   // a key, in rows of multiply-adds

  Interval keys_of(const RowTile& tile) const {
    return make_band(problem_.spec, tile.sequence).rows(tile.begin, tile.end);
  }
  static double cost_of_key(const RowTile& tile) { return kCostOfLoading + tile.rows(); }
  static double cost(const RowTile& tile, Interval keys) { return cost_of_key(tile) * keys.size(); }

  const Problem& problem_;
  const RowGrid& grid_;
  double total_ = 0, fair_ = 0;
};

}  // namespace jax_flash
