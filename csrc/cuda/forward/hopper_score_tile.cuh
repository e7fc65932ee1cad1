// The operands that cuda/forward/hopper_consumer.cuh passes to products and scores: the location of a
// tile of S, and V without the rows of other tokens.
#pragma once

#include <cstdint>

#include "core/band.h"
#include "cuda/hopper/roles.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/score/operands.cuh"
#include "cuda/tile/operands.cuh"

namespace jax_flash {

// The location, for the score variants, of the tile of S in a warp's registers.
template <class Consumer>
struct ConsumerTile {
  using Element = typename Consumer::T;
  using Input = typename Consumer::Config::Input;
  static constexpr int kConsumers = Consumer::Config::kConsumers;
  const Consumer& of;
  uint32_t input_use;  // use of the input's pipeline
  const Problem& p = of.p;
  const typename Consumer::Config::Shared& shared = of.shared;
  const int consumer = of.consumer;
  int32_t key = 0;  // for variants that are kPositional: the tile's first key

  __device__ __forceinline__ const ScoreOperands& operands() const { return of.tile->score; }
  __device__ __forceinline__ const Band& band() const { return of.tile->band; }
  // With ranges: the keys that the band shows to row i.
  __device__ __forceinline__ Interval in_band(int32_t i) const {
    const Interval& apart = of.tile->in_band;
    return {i + apart.lo, min(i + apart.hi, of.tile->band.k_len)};
  }
  // With ranges: the number of the sequence's keys before those of the query tile.
  __device__ __forceinline__ int32_t keys_before() const { return of.tile->first_key; }
  // For listed tiles: the pieces, the number of keys in each, and the blocks that the consumer's head sees.
  __device__ __forceinline__ const KeyPieces& pieces() const { return of.shared.pieces.of_use(input_use); }
  __device__ __forceinline__ int32_t keys_of_piece() const { return of.tile->keys_of_piece; }
  __device__ __forceinline__ BlockMask block_mask() const {
    BlockMask mask = operands().block_mask(p);
    mask.seen += of.tile->heads_before(consumer) * mask.head;
    return mask;
  }
  // Of a boolean mask: the thread's word of the consumer's rows and the tile of `key`. For listed tiles: the
  // keys that the band shows to all of these rows.
  __device__ __forceinline__ uint32_t mask_word(int32_t key) const {
    const auto& tile = *of.tile;
    return tile.mask_words[tile.rows_before(consumer) / kRowBlock * tile.words_of_rows +
                           int64_t{key / kRowBlock} * tile.words_of_keys + threadIdx.x % kWarpgroup];
  }
  // Of float8 pages: the scale of each 8 keys, and whether S has to be multiplied by it.
  __device__ __forceinline__ bool scales_keys() const { return of.tile->scales_keys; }
  __device__ __forceinline__ const float* key_scales() const {
    return of.shared.stored.key_scales(input_use);
  }
  __device__ __forceinline__ const Interval& keys_in_band() const { return of.tile->keys_in_band[consumer]; }
  __device__ __forceinline__ int32_t row() const { return of.row(); }
  __device__ __forceinline__ int32_t sequence() const { return of.tile->work.tile.index; }
  __device__ __forceinline__ int32_t head() const { return of.tile->work.head; }
};

// If tile n is the last one: V ← 0 in its rows [last_values, kKeys), because they may hold NaN, and 0 · NaN
// is NaN. Every consumer clears the rows that it reads.
template <int kKeys, class Consumer>
__device__ __forceinline__ void clear_values(const Consumer& of, int32_t n) {
  using C = typename Consumer::Config;
  using VTile = typename C::VTile;
  if (n != uniform(of.tile->tiles.hi) - 1 || of.tile->last_values >= kKeys) return;
  of.shared.wait_value(of.kv_index);
  const uint32_t v = ptx::shared_address(of.shared.value(of.kv_index));
  const int thread = threadIdx.x % 128, first = of.tile->last_values;
  for (int at = thread; at < (kKeys - first) * VTile::kChunks; at += 128)
    ptx::store_shared(v + VTile::offset(first + at / VTile::kChunks, at % VTile::kChunks), uint4{});
  ptx::fence_async_shared();
  ptx::sync_group(1 + C::kConsumers * (1 + of.team) + of.consumer, kWarpgroup);
}

}  // namespace jax_flash
