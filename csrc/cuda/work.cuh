// What one thread block does: which query tile of which sequence and head, and where its operands lie.
#pragma once

#include <cstdint>

#include "core/band.h"
#include "core/plan.h"
#include "core/problem.h"
#include "core/sequence.h"

namespace jax_flash {

struct BlockWork {
  int64_t leading;
  int32_t head, batch_row;  // batch_row: the batch index of per-token operands, 0 for varlen
  TileWork tile;

  // Element offset of a row of this sequence, at this block's head or at its KV head.
  __device__ __forceinline__ int64_t offset(const Problem& p, const View& view, int64_t row) const {
    return view.leading_offset(p.leading, leading) + view.offset(batch_row, head, row);
  }
  __device__ __forceinline__ int64_t kv_offset(const Problem& p, const View& view, int64_t row) const {
    return view.leading_offset(p.leading, leading) + view.offset(batch_row, p.kv_head(head), row);
  }
  __device__ __forceinline__ Band band(const Problem& p) const {
    return make_band(p.spec,
                     Sequence{tile.index, batch_row, tile.q_begin, tile.k_begin, tile.q_len, tile.k_len});
  }
};

// Tiles of one head are neighbours, the last and (when causal) longest first.
__device__ __forceinline__ BlockWork find_work(const Problem& p, const TileWork* schedule, int32_t tiles,
                                               int32_t block_m) {
  uint32_t rest = blockIdx.x;
  const int32_t t = tiles - 1 - static_cast<int32_t>(rest % tiles);
  rest /= tiles;
  BlockWork work;
  work.head = static_cast<int32_t>(rest % p.heads);
  rest /= p.heads;
  if (p.varlen()) {
    work.leading = rest;
    work.batch_row = 0;
    work.tile = schedule[int64_t{rest} * tiles + t];
  } else {
    work.batch_row = static_cast<int32_t>(rest % p.batch);
    work.leading = rest / p.batch;
    const Sequence s = fixed_sequence(p, work.leading, work.batch_row);
    const int32_t row = t * block_m;
    work.tile = {s.index, 0, 0, s.q_len, s.k_len, row, row + min(block_m, p.q_rows - row), 0};
  }
  return work;
}

}  // namespace jax_flash
