// Decode over latent pools (multi-head latent attention), whose V is the first columns of K: how query rows
// are cut into chunks, and the layout of shared memory. Plan and kernels share these numbers.
#pragma once

#include <cstdint>

#include "core/plan/row.h"

namespace jax_flash::latent {

// The query rows of a KV head are cut into chunks of at most `rows`: some heads of one token, or all heads of
// a few tokens. An entry is one chunk of one sequence.
struct Chunks {
  int32_t tokens;  // tokens of a chunk, at least 1
  int32_t heads;   // chunks that one token's heads are cut into

  constexpr Chunks(int64_t group, int32_t rows)
      : tokens(group < rows ? static_cast<int32_t>(rows / group) : 1),
        heads(static_cast<int32_t>((group + rows - 1) / rows)) {}
};

// The fewest columns of a pool that the latent kernels read; other kernels are faster for fewer.
inline constexpr int64_t kFewestColumns = 257;

inline constexpr int64_t kStateBytes = 2048;  // barriers, segments and softmax states, at most

// Q, `stages` tiles of K, and P.
constexpr int64_t tile_bytes(const Row& r) {
  return 2 *
         (int64_t{r.head_dim} * (r.block_m + int64_t{r.stages} * r.block_n) + int64_t{r.block_m} * r.block_n);
}

// The sm_90a kernel of few rows: Q, `stages` tiles of K, and S of eight warps in float32.
constexpr int64_t few_bytes(const Row& r) {
  return 2 * int64_t{r.head_dim} * (r.block_m + int64_t{r.stages} * r.block_n) +
         int64_t{8} * 4 * r.block_m * r.block_n;
}

// The portable kernel: kProductWarps of its warps multiply, and the others load.
inline constexpr int32_t kProductWarps = 8;
inline constexpr int32_t kLeastTile = 32;  // fewest columns of P's tile

// S = Q Kᵀ is split over the head dim into this many parts. A warp computes one part of 16 × 16 elements of
// S.
constexpr int32_t portable_splits(int32_t block_m, int32_t block_n) {
  return kProductWarps / (block_m / 16 * (block_n / 16));
}

// The row stride of S in floats, chosen so that accesses by row and by column have no bank conflicts.
constexpr int32_t score_pitch(int32_t block_n) { return block_n + 8; }

// Q, `stages` tiles of K, P, and S of all splits in float32.
constexpr int64_t portable_bytes(const Row& r) {
  return 2 * (int64_t{r.head_dim} * (r.block_m + int64_t{r.stages} * r.block_n) +
              int64_t{r.block_m} * kLeastTile) +
         int64_t{4} * portable_splits(r.block_m, r.block_n) * r.block_m * score_pitch(r.block_n);
}

}  // namespace jax_flash::latent
