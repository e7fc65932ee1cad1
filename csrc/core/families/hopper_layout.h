// What lies in the shared memory of a CTA of the Hopper family: the same numbers for plan and kernel.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "core/plan/row.h"

namespace jax_flash::hopper {

inline constexpr int32_t kConsumerRows = 64;         // query rows of a consumer warpgroup: M of wgmma
inline constexpr int64_t kStateBytes = 2048;         // barriers and tile states of a team, at most
inline constexpr int64_t kMaxSharedBytes = 232'448;  // that a CTA may use
inline constexpr int64_t kElementBytes = 2;          // float16 and bfloat16

// Whether a forward's row has the query heads of a KV head in one tile (core/problem.h, HeadPacking).
template <class Row>
constexpr bool packs_heads(const Row& row) {
  return row.loaders == 1u << static_cast<int32_t>(Loader::kPaged) && row.block_m == kConsumerRows;
}

// Q of one tile, and `stages` tiles of K and of V; of each team.
constexpr int64_t forward_tile_bytes(int32_t head_dim, int32_t value_dim, int32_t block_m, int32_t block_n,
                                     int32_t stages) {
  return kElementBytes * (int64_t{block_m} * head_dim + int64_t{block_n} * stages * (head_dim + value_dim));
}

// Whether dense forwards of such tiles, without options that need the room, store o from shared memory, by
// TMA: where that was measured to be faster.
constexpr bool forward_stores_by_tma(int32_t head_dim, int32_t value_dim, int32_t block_m) {
  return head_dim == 128 && value_dim == 128 && block_m == 2 * kConsumerRows;
}
constexpr int64_t forward_output_bytes(int32_t head_dim, int32_t value_dim, int32_t block_m) {
  return forward_stores_by_tma(head_dim, value_dim, block_m) ? kElementBytes * block_m * value_dim : 0;
}

constexpr int64_t forward_shared_bytes(int64_t tile_bytes, int32_t teams) {
  return teams * (tile_bytes + kStateBytes);
}

// The backward: K and V of a key tile, `stages` tiles of Q and dO with lse and delta, and a few of dS, with
// dQ in float32 or one more.
inline constexpr int32_t kScoreGradientStages = 3;
inline constexpr int32_t kMostQueryRows = 128;       // of a query tile
inline constexpr int64_t kKeyTileStateBytes = 1024;  // barriers and the state of the key tile, at most

constexpr int64_t backward_shared_bytes(int32_t head_dim, int32_t value_dim, int32_t block_m, int32_t block_n,
                                        int32_t stages) {
  const int64_t rows = block_n + int64_t{stages} * block_m;
  const int64_t ds = kElementBytes * block_m * block_n,
                dq = static_cast<int64_t>(sizeof(float)) * block_m * head_dim;
  const int64_t statistics = 2 * int64_t{stages} * block_m;
  return kElementBytes * rows * (head_dim + value_dim) + kScoreGradientStages * ds + (ds > dq ? ds : dq) +
         static_cast<int64_t>(sizeof(float)) * statistics + kKeyTileStateBytes;
}

// The bias gradient: two tiles of the bias, and perhaps the mask, with what else a step needs, and a ring of
// pairs of tiles, Q and K or dO and V, in the rest: `stages` at most.
inline constexpr int64_t kBiasStateBytes = 3072;
constexpr int32_t bias_gradient_stages(int32_t width, int32_t block_m, int32_t block_n, int32_t stages,
                                       bool mask) {
  const int64_t tiles = 2 * int64_t{block_m} * block_n * (kElementBytes + (mask ? 1 : 0));
  const int64_t pair = kElementBytes * (int64_t{block_m} + block_n) * width;
  const auto fit = static_cast<int32_t>((kMaxSharedBytes - kBiasStateBytes - tiles) / pair);
  return stages < fit ? stages : fit;
}

// The backward in 2-CTA clusters: a CTA has K and V of half of the tile's keys, half of the columns of the
// other keys' K, `stages` tiles of Q with lse and delta, halves of tiles of dO, tiles of dS, and perhaps its
// part of dQ in float32. `score_bytes` hold bias and mask of its keys.
struct BackwardClusterStages {
  int32_t dout_halves, ds;
  bool dq;
};

constexpr int64_t backward_cluster_shared_bytes(int32_t head_dim, int32_t value_dim, int32_t block_m,
                                                int32_t block_n, int32_t stages, BackwardClusterStages has) {
  const int64_t keys = block_n / 2 * (int64_t{head_dim} + head_dim / 2 + value_dim);
  const int64_t queries = block_m * (int64_t{stages} * head_dim + has.dout_halves * value_dim / 2);
  const int64_t ds = int64_t{has.ds} * block_m * block_n;
  const int64_t dq = has.dq ? int64_t{block_m} * head_dim / 2 : 0, statistics = 2 * int64_t{stages} * block_m;
  return kElementBytes * (keys + queries + ds) + static_cast<int64_t>(sizeof(float)) * (dq + statistics) +
         kStateBytes;
}

// Room for bias and mask.
constexpr int64_t backward_cluster_score_bytes(int32_t head_dim, int32_t value_dim, int32_t block_m,
                                               int32_t block_n, int32_t stages, BackwardClusterStages has) {
  return kMaxSharedBytes - backward_cluster_shared_bytes(head_dim, value_dim, block_m, block_n, stages, has);
}

// Two of each. Where there is no room for that and `score_bytes`, dQ is not staged, then there are one and a
// half of dO, then one of dS.
constexpr BackwardClusterStages backward_cluster_stages(int32_t head_dim, int32_t value_dim, int32_t block_m,
                                                        int32_t block_n, int32_t stages,
                                                        int64_t score_bytes) {
  constexpr BackwardClusterStages kFewest{3, 1, false};
  for (const BackwardClusterStages has : {BackwardClusterStages{4, 2, true}, {4, 2, false}, {3, 2, false}}) {
    if (backward_cluster_score_bytes(head_dim, value_dim, block_m, block_n, stages, has) >= score_bytes)
      return has;
  }
  return kFewest;
}

}  // namespace jax_flash::hopper
