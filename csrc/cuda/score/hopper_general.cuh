// The sm_90a variants of the general score, without and with dropout.
#pragma once

#include <cstdint>

#include "core/visible/row_blocks.h"
#include "cuda/score/dropout.cuh"
#include "cuda/score/general.cuh"
#include "cuda/score/lane_bits.cuh"
#include "cuda/score/ranges.cuh"
#include "cuda/score/segment_ranges.cuh"

namespace jax_flash {

// What ranges, and in the forward a boolean mask, show of a tile, in bits. They are found while the tensor
// cores compute S, because they come from global memory.
template <class S, bool kTransposed = S::kTransposed>
struct ShownElements {
  uint32_t bits[S::kSlots];  // by slot, a bit for each of the lane's elements, in their order

  template <class Tile>
  __device__ __forceinline__ void find(const Tile& tile, int32_t key) {
#pragma unroll
    for (uint32_t& own : bits) own = ~0u;
    if constexpr (requires { tile.mask_word(key); })
      if (tile.p.mask) take_mask(tile, key);
    if (tile.p.ranges) limit_to_ranges(tile, key);
  }
  template <class Scores>
  __device__ __forceinline__ void hide(Scores& s) const {
    hide_unless_seen(s, bits);
  }
  __device__ __forceinline__ bool sees(int slot, int n, int e) const { return bits[slot] >> (2 * n + e) & 1; }
  // Whether the warp's rows see all keys.
  __device__ __forceinline__ bool all() const { return all_seen<S>(bits); }
  // What the mask shows: its words (MaskWords) of the tile's keys, which lie in one or two of its tiles.
  template <bool kSharing = true, class Tile>
  __device__ __forceinline__ void take_mask(const Tile& tile, int32_t key) {
    static_assert(S::kSlots == 2 && (S::kColumns % kRowBlock == 0 || S::kColumns <= kRowBlock + 48));
    const int32_t next = (key / kRowBlock + 1) * kRowBlock, before = key % kRowBlock / 4;
    const uint32_t low = tile.mask_word(key), high = next < tile.p.k_rows ? tile.mask_word(next) : 0;
    bits[0] = __byte_perm(low, high, 0x5410) >> before;
    bits[1] = __byte_perm(low, high, 0x7632) >> before;
  }

 private:
  template <class Tile>
  __device__ __forceinline__ void limit_to_ranges(const Tile& tile, int32_t key) {
    const RowRanges ranges = tile.operands().row_ranges(tile.p);
    LimitsOfRow limits[S::kSlots];
    load_limits<S>(limits, tile, ranges);
    const auto bits_of = [&](const int2& range) {
      return bits_of_columns(columns_from(key + S::column(0), {range.x, range.y}));
    };
#pragma unroll
    for (int slot = 0; slot < S::kSlots; ++slot) {
      uint32_t seen = bits_of(limits[slot].first);
      if (ranges.two) seen |= bits_of(limits[slot].second);
      bits[slot] &= seen;
    }
  }
};

template <class S>
struct ShownElements<S, true> {
  SeenByLanes<S> seen;
  bool rows_share = false;  // all rows see the same keys

  template <class Tile>
  __device__ __forceinline__ void find(const Tile& tile, int32_t key) {
    const RowRanges ranges = tile.operands().row_ranges(tile.p);
    const Band& band = tile.band();
    seen.find(tile.row(), key, [&](int32_t i) { return seen_in_ranges<S>(ranges, band, i, key); });
  }
  __device__ __forceinline__ void hide(S& s) const {
    rows_share ? hide_unseen_of_all_rows(s, seen.bits[0]) : hide_unseen_transposed(s, seen);
  }
  // What the mask and the band show. kSharing: hide() has a path of its own for rows that share their keys.
  template <bool kSharing = true, class Tile>
  __device__ __forceinline__ void take_mask(const Tile& tile, int32_t key) {
    static_assert(S::kColumns == MaskRows::kKeys && S::kRows % 64 == 0);
    const MaskRows mask = mask_rows_from(tile.p, tile.operands().mask);
    const bool is_shared = mask.row == 0;
    if constexpr (kSharing) rows_share = is_shared;
    if (is_shared) {  // rows past the sequence have P = 0 anyway
      const uint32_t one = mask.bits_of_one(0, tile.band().k_len - key, key);
#pragma unroll
      for (int i = 0; i < (kSharing ? 1 : SeenByLanes<S>::kWords); ++i) seen.bits[i] = one;
      return;
    }
    const int32_t row = tile.row() + ptx::thread_index() % 32;
#pragma unroll
    for (int i = 0; i < SeenByLanes<S>::kWords; i += 2) {
      const uint32_t two = mask.bits_of_two(row + 32 * i, row + 32 * (i + 1), tile.band(), key);
      seen.bits[i] = two & 0xffff, seen.bits[i + 1] = two >> 16;
    }
  }
};

// Any options except dropout. While the tensor cores compute S, this also finds out whether all keys of the
// tile, or none, belong to the rows' own segment.
template <class S>
struct HopperGeneralScore : GeneralScore<S, false> {
  InSegment in_segment;
  ShownElements<S> shown;

  template <class Softmax>
  __device__ __forceinline__ static float start(const Problem&) {
    return 1;
  }
  template <bool kScalarDropout, class Tile>
  __device__ __forceinline__ void prefetch(const Tile& tile, int32_t key) {
    in_segment = jax_flash::in_segment<S>(tile.p, tile.operands(), tile.band(), tile.row(), key);
    if (leaves_gaps(tile.p)) shown.find(tile, key);
  }
  template <class Scores, class Tile, class Softmax>
  __device__ __forceinline__ void apply(Scores& s, const Tile& tile, const Softmax&) {
    this->score(s, tile, in_segment, NoGradient{});
    if (leaves_gaps(tile.p)) shown.hide(s);
  }
  template <class Tile>
  __device__ __forceinline__ void prefetch_gradient(const Tile& tile) {
    in_segment = in_segment_of<S>(tile);
    if (tile.p.ranges) shown.find(tile, tile.key);
  }
  template <GradientOf kOf, class Tile>
  __device__ __forceinline__ void differentiate(S& s, S& dp, const Tile& tile) {
    this->template differentiate_in<kOf>(s, dp, tile, in_segment);
    if (tile.p.ranges) shown.hide(s);
  }
};

// Any options, including dropout.
template <class S>
struct HopperGeneralDropoutScore : WithDropout<HopperGeneralScore<S>, S> {
  template <bool kScalarDropout, class Tile>
  __device__ __forceinline__ void prefetch(const Tile& tile, int32_t key) {
    HopperGeneralScore<S>::template prefetch<kScalarDropout>(tile, key);
    if (kScalarDropout || tile.operands().dropout.needs_scalar_path()) {
      this->draw_one_by_one(tile, key);
    } else {
      this->draw(tile, key);
    }
  }
};

}  // namespace jax_flash
