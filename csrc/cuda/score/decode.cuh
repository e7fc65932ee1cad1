// The score of decode: softcap, ALiBi, ranges, block masks and the draft mask, for rows that belong to one
// sequence but to several heads.
#pragma once

#include "core/problem.h"
#include "cuda/score/alibi.cuh"
#include "cuda/score/decode_blocks.cuh"
#include "cuda/score/draft.cuh"
#include "cuda/score/ranges.cuh"
#include "cuda/score/softcap.cuh"
#include "cuda/score/variant.cuh"

namespace jax_flash {

// Tile has: scale(), spec.scale times the pool's scale; softcap(); has_slopes(), slope(slot) and
// distance(slot), the diagonal of the slot's row minus the lane's first key; has_ranges() and seen(slot), the
// keys that the slot's row sees; hides_blocks(), whether a block mask hides some of the tile's keys from some
// row; draft_mask() and position(slot), the position of the slot's row. kOptions: whether there may be any
// option.
template <class S, bool kOptions>
struct DecodeScore : ScoreVariant<S> {
  static constexpr bool kGeneral = kOptions, kPositional = true;
  static constexpr bool reads(Operand operand) {
    return operand == Operand::kAlibiSlopes || operand == Operand::kDraftMask ||
           operand == Operand::kRanges || operand == Operand::kBlockMask || operand == Operand::kMask;
  }

  // S ← log2(e) · (softcap(scale · S) − slope · distance), −inf where a mask hides the key, element
  // by element, so that a row's bits depend on no other row.
  template <class Tile>
  __device__ __forceinline__ void apply(S& s, const Tile& tile) const {
    const float scale = tile.scale(), c = tile.softcap();
    if (kOptions && c > 0) {
      cap(s, c, scale, NoGradient{});
    } else {
      for_each(s, [&](float& x, int, int, int) { x *= scale * kLog2e; });
    }
    if (kOptions && tile.has_slopes()) {
      subtract_distances(
          s, [&](int slot) { return tile.slope(slot) * kLog2e; },
          [&](int slot) { return tile.distance(slot); }, [](float x) { return x; });
    }
    if (kOptions && tile.has_ranges()) hide_unseen(s, tile.key, [&](int slot) { return tile.seen(slot); });
    if constexpr (kOptions) {
      const auto position = [&](int slot) { return tile.position(slot); };
      if (tile.hides_blocks()) hide_outside_blocks(s, tile);
      hide_drafts(s, tile.draft_mask(), tile.band(), tile.key, position);
    }
  }
};

}  // namespace jax_flash
