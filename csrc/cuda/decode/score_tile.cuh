// S of some rows of a column and some keys, as the score of decode sees it (cuda/score/decode.cuh).
#pragma once

#include <cstdint>

#include "cuda/decode/sequence_work.cuh"

namespace jax_flash::decode {

// The tile of S for a score variant: the column's rows from `first_row` on, and the keys from `key` on.
template <class S>
struct DecodeTile {
  const DecodeCall& call;
  const ColumnRows& rows;
  const SequenceWork& work;
  int32_t key;
  float key_scale;
  int32_t first_row = 0;
  bool hides = false;  // whether a block mask hides some of the keys from some row

  __device__ __forceinline__ float scale() const { return key_scale; }
  __device__ __forceinline__ float softcap() const { return call.softcap; }
  __device__ __forceinline__ bool has_slopes() const { return bool(call.alibi_slopes); }
  __device__ __forceinline__ float slope(int slot) const {
    return *call.alibi_slopes.at<const float>(work.leading, work.index, rows.head(row(slot)), 0);
  }
  __device__ __forceinline__ float distance(int slot) const {
    return static_cast<float>(work.band.diagonal(rows.position(row(slot))) - key - S::column(0));
  }
  __device__ __forceinline__ const Band& band() const { return work.band; }
  __device__ __forceinline__ int32_t position(int slot) const { return rows.position(row(slot)); }
  __device__ __forceinline__ bool has_ranges() const { return bool(call.ranges); }
  __device__ __forceinline__ SeenKeys seen(int slot) const {
    return seen_by_ranges(call, rows, work, row(slot), {key, key + S::kColumns});
  }
  __device__ __forceinline__ ElementMask draft_mask() const { return draft_mask_of(call, work); }
  __device__ __forceinline__ bool hides_blocks() const { return hides; }
  __device__ __forceinline__ BlockMask block_mask() const { return block_mask_of(call, work); }
  __device__ __forceinline__ int32_t head(int slot) const { return rows.head(row(slot)); }
  __device__ __forceinline__ int32_t block_of_row(const BlockMask& mask, int slot) const {
    return call.block_rows.quotient(position(slot) + mask.first_row);
  }
  // Whether all rows of the column have the same row of blocks.
  __device__ __forceinline__ bool shares_blocks(const BlockMask& mask) const {
    return mask.head == 0 && call.block_rows.quotient(rows.first_position() + mask.first_row) ==
                                 call.block_rows.quotient(rows.position(rows.count() - 1) + mask.first_row);
  }

 private:
  __device__ __forceinline__ int32_t row(int slot) const {
    return min(first_row + S::row(slot), rows.count() - 1);
  }
};

// The tile for rows whose mask already hides the keys outside their ranges, but not those between two ranges.
template <class S>
struct MaskedTile : DecodeTile<S> {
  __device__ __forceinline__ bool has_ranges() const { return this->call.two_ranges; }
};

}  // namespace jax_flash::decode
