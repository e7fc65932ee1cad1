// Dropout's numbers for whole tiles of keys, as the sm90 forward asks for them.
#pragma once

#include <cstdint>

#include "cuda/dropout.cuh"
#include "cuda/score.cuh"

namespace jax_flash {

template <class S>
using KeptTile = KeptNumbers<S, S::kColumnTiles>;

template <class S>
__device__ __forceinline__ KeptTile<S> kept_tile(const ScoreOperands& operands, int32_t row, int32_t key) {
  static_assert(S::kSlots == 2 && S::kColumnTiles % 4 == 0);
  const Dropout& dropout = operands.dropout;
  const uint32_t first = (key + dropout.column) / kDropoutColumns * 4 + threadIdx.x % 4;
  constexpr int kTogether = 2;  // blocks: a round waits for the one before it
  KeptTile<S> kept(dropout.threshold);
#pragma unroll
  for (int n = 0; n < S::kColumnTiles; n += 4 * kTogether) {
    PhiloxBlock blocks[kTogether];
#pragma unroll
    for (int b = 0; b < kTogether; ++b)
      blocks[b] = dropout.counter(operands.batch, operands.head, row + S::row(0), first + n + 4 * b);
    philox(dropout.key0, dropout.key1, blocks);
#pragma unroll
    for (int b = 0; b < kTogether; ++b)
      if (n + 4 * b < S::kColumnTiles) kept.set(0, n + 4 * b, blocks[b]);
  }
  return kept;
}

// Where the dropout is odd(): numbers whose upper bytes say the same of another threshold.
template <class S>
__device__ __forceinline__ KeptTile<S> kept_tile_one_by_one(const ScoreOperands& operands, int32_t row,
                                                            int32_t key) {
  const Dropout& dropout = operands.dropout;
  KeptTile<S> kept(0x4000u);
  for (uint32_t& word : kept.word[0]) word = 0;
#pragma unroll 1
  for (int at = 0; at < 4 * S::kColumnTiles; ++at) {
    const int e = at % 2, slot = at / 2 % 2, n = at / 4;
    const bool keep = dropout.keep(operands.batch, operands.head, row + S::row(slot), key + S::column(n) + e);
    const uint32_t byte = 0x70u << (8 * KeptTile<S>::upper_byte(slot, e));
#pragma unroll
    for (int i = 0; i < S::kColumnTiles; ++i)
      if (i == n && keep) kept.word[0][i] |= byte;
  }
  return kept;
}

}  // namespace jax_flash
