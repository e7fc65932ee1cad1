// How forward splits the keys of its tiles, so that a few long sequences keep all threads busy. The split
// depends on the problem alone, and parts are merged in order, so that the number of threads does not
// change any bit of the result.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../core/split.h"
#include "plan.h"

namespace jax_flash {

class Splits {
 public:
  Splits(const Problem& p, const RowGrid& grid) : problem_(p), grid_(grid) {
    middles_.reserve(p.leading.count() * grid.slots());
    for (int64_t l = 0; l < p.leading.count(); ++l) {
      double sum = 0;
      for (int64_t i = 0; i < grid.slots(); ++i) {
        RowTile tile;
        const double own = grid.at(l * per_entry() + i, tile) ? cost(tile, keys_of(problem_, tile)) : 0;
        middles_.push_back(sum + own / 2);
        sum += own;
      }
      ends_.push_back(total_ += sum * static_cast<double>(grid.heads()));
    }
  }

  // Approximate multiply-adds of the whole call, divided by d + dv.
  double cost() const { return total_; }

  // Sets `tile` to the tile at `index` with its number of parts. Returns false for a slot without rows.
  bool at(int64_t index, RowTile& tile) const {
    if (!grid_.at(index, tile)) return false;
    const Interval keys = keys_of(problem_, tile);
    const AttentionSpec& s = problem_.spec;
    if (s.num_splits > 0) {
      tile.parts = clamp_splits(s.num_splits, keys);
    } else if (s.batch_invariant) {
      tile.parts = clamp_splits(ceil_div(keys.size(), kInvariantSplit), keys);
    } else {
      const double keys_per_part = std::max<double>(kSmallestPart, fair_share(tile) / cost_of_key(tile));
      tile.parts = clamp_splits(static_cast<int64_t>(keys.size() / keys_per_part), keys);
    }
    return true;
  }

  // Whether the parts of a tile are work items of their own, because the tile exceeds a fair share of the
  // work.
  bool is_parallel(const RowTile& tile) const {
    return tile.parts > 1 && cost(tile, keys_of(problem_, tile)) > fair_share(tile);
  }

  // The first tile of the grid beyond this share of the total cost.
  int64_t first_tile_after(double share) const {
    if (share >= 1.0 || grid_.size() == 0) return grid_.size();
    const double target = total_ * share;
    const int64_t l = std::upper_bound(ends_.begin(), ends_.end() - 1, target) - ends_.begin();
    const double begin = l > 0 ? ends_[l - 1] : 0;
    const double of_head = (ends_[l] - begin) / static_cast<double>(grid_.heads());
    if (of_head <= 0) return l * per_entry();
    const auto head = std::min<int64_t>(static_cast<int64_t>((target - begin) / of_head), grid_.heads() - 1);
    const auto first = middles_.begin() + l * grid_.slots();
    const double rest = target - begin - of_head * static_cast<double>(head);
    const int64_t tiles = std::lower_bound(first, first + grid_.slots(), rest) - first;
    return l * per_entry() + head * grid_.slots() + tiles;
  }

 private:
  static constexpr double kSmallestPart = 512;  // keys
  static constexpr double kCostOfLoading = 8;   // per key, in query rows of multiply-adds

  // The intended number of work items, more than there are threads. Tiles of many rows have fewer, because
  // each part packs its keys.
  static constexpr double kTargetItems = 64, kPackedTargetItems = 8;
  static constexpr int32_t kPackedRows = 32;

  double fair_share(const RowTile& tile) const {
    return total_ / (tile.rows() < kPackedRows ? kTargetItems : kPackedTargetItems);
  }
  int64_t per_entry() const { return grid_.slots() * grid_.heads(); }
  static double cost_of_key(const RowTile& tile) { return kCostOfLoading + tile.rows(); }
  static double cost(const RowTile& tile, Interval keys) { return cost_of_key(tile) * keys.size(); }

  const Problem& problem_;
  const RowGrid& grid_;
  // [L, slots]: for every tile of a head, in the order of the grid, the head's cost up to the tile's middle.
  std::vector<double> middles_;
  std::vector<double> ends_;  // [L]: the cost up to the end of each leading entry
  double total_ = 0;
};

}  // namespace jax_flash
