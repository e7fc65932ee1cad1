// The units in which decode divides its work, and the division, which host and device compute alike.
//
// A column is one KV head, or a chunk of its query rows. The key tiles of all sequences, one sequence after
// the other, are divided into equal ranges, one for each block of a column. If the call fixes the splits of a
// sequence, the unit of division is a split instead of a tile.
#pragma once

#include <cstdint>

#include "core/band.h"
#include "core/plan/launch_plan.h"
#include "core/split.h"

namespace jax_flash::decode {

// The tiles that the end of a sequence counts as, because merging and writing its results takes time. If few
// sequences end in a range, ranges are closer to equal without them.
inline int32_t end_tiles(const DecodeGrid& grid, int32_t sequences) {
  constexpr int32_t kEndTiles = 4;
  return !grid.fixed_parts() && 2 * int64_t{sequences} >= grid.ranges ? kEndTiles : 0;
}

// The key tiles of a sequence, and the work units that they form.
struct SequenceUnits {
  int32_t begin, count;  // tiles. A sequence without keys has one, since its results must be written too.
  int32_t unit_tiles;    // tiles per unit
  int32_t parts;         // units that have tiles: splits if the call fixes them, else tiles
  int32_t units;         // parts, and the units that stand for the sequence's end

  // tiles: those that the rows see. served: whether decode attends to the sequence.
  JF_HD SequenceUnits(const DecodeGrid& grid, int32_t end_tiles, Interval tiles, bool served) {
    begin = tiles.lo;
    count = tiles.empty() ? 1 : tiles.size();
    unit_tiles = 1, parts = count, units = count + end_tiles;
    if (grid.fixed_parts()) {
      unit_tiles = grid.part_tiles;
      if (grid.parts > 0) unit_tiles = (count - 1) / clamp_splits(grid.parts, {0, count}) + 1;
      units = parts = (count - 1) / unit_tiles + 1;
    }
    if (!served) units = 0;
  }
};

// The ranges of units of a column's blocks: the first `larger` have size + 1 units, the others `size`.
struct Partition {
  int32_t total;   // units of all sequences
  int32_t ranges;  // number of ranges that are not empty
  int32_t size, larger;

  JF_HD int32_t begin(int32_t range) const {
    const int32_t at = range * size + (range < larger ? range : larger);
    return at < total ? at : total;
  }
  // The range that a unit belongs to.
  JF_HD int32_t owner(int32_t unit) const {
    const int32_t in_larger = larger * (size + 1);
    const bool in = unit < in_larger;
    return (in ? 0 : larger) + (unit - (in ? 0 : in_larger)) / (in ? size + 1 : size);
  }

  // Ranges are equal. Only if all `sequences` have the same number of units, and the imbalance costs less
  // than splitting would, do ranges hold whole sequences.
  Partition() = default;
  JF_HD Partition(const DecodeGrid& grid, int32_t sequences, int32_t all_units, int32_t largest)
      : total(all_units), ranges(grid.ranges < all_units ? grid.ranges : all_units), size(0), larger(0) {
    if (total == 0) return;
    size = static_cast<uint32_t>(total) / static_cast<uint32_t>(ranges);
    larger = total - size * ranges;
    if (grid.fixed_parts() || int64_t{largest} * sequences != total) return;
    constexpr int32_t kSplitCost = 4;  // cost of a split, in tiles
    const int64_t whole =
        int64_t{static_cast<uint32_t>(sequences - 1) / static_cast<uint32_t>(ranges) + 1} * largest;
    if (whole * ranges - total > int64_t{kSplitCost} * ranges) return;
    size = static_cast<int32_t>(whole), larger = 0;
  }
};

}  // namespace jax_flash::decode
