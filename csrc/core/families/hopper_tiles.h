// The choice between the query tiles of the Hopper forward.
#pragma once

#include <algorithm>

#include "core/families/hopper_layout.h"
#include "core/plan/call.h"

namespace jax_flash::hopper {

// The consumer warpgroups of a query tile, or two teams with two of them each.
enum class Consumers { kOne, kTwo, kThree, kTeams };

inline Consumers consumers_of(const KernelRow& row) {
  if (row.teams > 1) return Consumers::kTeams;
  return row.block_m == kConsumerRows       ? Consumers::kOne
         : row.block_m == 2 * kConsumerRows ? Consumers::kTwo
                                            : Consumers::kThree;
}

// Keys of a query tile, or rows of a key tile, from which a counter hands tiles out.
inline constexpr int64_t kLongTile = 4096;

// Chooses the shape of the forward's tiles for a call. The limits were measured on one H200
// (docs/experiments).
class TileChoice {
 public:
  explicit TileChoice(const Call& call) : call_(call), visible_keys_(call.visible_keys()) {}

  // If the grid of small tiles fits in one wave, larger ones would leave SMs idle, and teams would, too.
  Consumers best() const {
    if (waves(kConsumerRows) <= 1) return Consumers::kOne;
    if (!call_.spec.packed() && waves(kSmallTile) <= 1) return Consumers::kTwo;
    if (std::max(call_.shapes.head_dim, call_.shapes.value_dim) > kSmallHeadDim)
      return wants_two() ? Consumers::kTwo : Consumers::kThree;
    return wants_teams() ? Consumers::kTeams : Consumers::kThree;
  }

 private:
  static constexpr int64_t kFewKeys = 256;
  static constexpr int64_t kSmallTile = 2 * kConsumerRows, kLargeTile = 3 * kConsumerRows;

  // Small tiles pay with few keys, or if their waves, at 145 rows each, cost no more than those of large
  // tiles, at 192: measured at d = 72 to 96.
  bool wants_two() const {
    constexpr int64_t kCostOfSmallTile = 145;
    if (visible_keys_ <= kFewKeys) return true;
    return !call_.spec.packed() && waves(kSmallTile) * kCostOfSmallTile <= waves(kLargeTile) * kLargeTile;
  }

  // With few keys, or few waves of tiles, two teams hide each other's prologue and epilogue, which outweighs
  // their smaller key tile.
  bool wants_teams() const {
    constexpr int64_t kFewKeysOfBand = 1024 + 1;  // a window of 1,024 before the row's own key
    const bool band = call_.spec.left >= 0 || call_.spec.right >= 0;
    if (visible_keys_ <= (band ? kFewKeysOfBand : kFewKeys)) return true;
    return !call_.spec.packed() &&
           few_waves();  // for packed sequences only an upper bound of the tiles is known
  }

  // Waves of query tiles with `rows` rows, one tile per SM at a time.
  int64_t waves(int64_t rows) const {
    const Shapes& s = call_.shapes;
    return ceil_div(ceil_div(s.q_rows, rows) * s.heads * call_.row_arrays(),
                    std::max(1, call_.device.sm_count));
  }

  // Whether the last wave of large tiles would leave more SMs idle than the last wave of the teams' smaller
  // tiles. The cost of a wave, in rows of large tiles, was measured at d = 64. If tiles differ in length,
  // short ones fill the last wave, and teams pay only if all their tiles run at once. If a counter hands out
  // equal tiles, the last may go to both teams of an SM while other SMs have none.
  bool few_waves() const {
    constexpr int64_t kCostOfOneTeam = 164, kCostOfBothTeams = 280;  // rows
    constexpr int64_t kMostWaves = 8, kMostTeamWaves = 2;
    const int64_t large = waves(kLargeTile), small = waves(kSmallTile);
    const bool few =
        call_.tiles_differ() ? small <= kMostTeamWaves : large <= kMostWaves && visible_keys_ < kLongTile;
    return few && small / 2 * kCostOfBothTeams + small % 2 * kCostOfOneTeam <= large * kLargeTile;
  }

  const Call& call_;
  int64_t visible_keys_;
};

}  // namespace jax_flash::hopper
