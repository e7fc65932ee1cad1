// Shared memory of the Hopper family's CTAs, in bytes, for plan and kernels.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "core/plan/row.h"

namespace jax_flash::hopper {

inline constexpr int32_t kConsumerRows = 64;  // query rows of a consumer warpgroup: M of wgmma
inline constexpr int32_t kSmallHeadDim = 64;  // larger ones leave no registers for teams, or 128 queries
inline constexpr int64_t kStateBytes = 2048;  // upper bound: barriers and tile states of a team
inline constexpr int64_t kMaxSharedBytes = 232'448;  // limit of a CTA
inline constexpr int64_t kElementBytes = 2;          // float16 and bfloat16

inline constexpr int32_t kClusterCtas = 2;
// A backward in clusters works on 64 keys in each CTA: on other keys than the other CTA, or on other columns
// of the same keys. Where the key tile of a row has only 64 keys, the cluster is a single CTA.
constexpr int32_t backward_cluster_ctas(const Row& r) {
  return r.design == Design::kCluster && r.block_n == kConsumerRows ? 1 : kClusterCtas;
}

// The columns for which a tile has room: whole panels, which may be wider than the head. The forward's panels
// have 64 columns where the head has more than 32: with 32, heads of 72 columns ran at .83 to .86 of the
// speed, and heads of 80 and 96 at the same. The backward's have 32 where 64 do not divide the head's
// columns, since two stages of 96 queries leave no room for more. (K has narrower ones where dQ's columns are
// divided by two.)
constexpr int32_t whole_panels(int32_t columns, int32_t panel) {
  return (columns + panel - 1) / panel * panel;
}
constexpr int32_t forward_panel(int32_t d) { return d > 32 ? 64 : 32; }
constexpr int32_t forward_columns(int32_t d) { return whole_panels(d, forward_panel(d)); }
constexpr int32_t backward_columns(int32_t d) { return whole_panels(d, 32); }

// CTAs of a cluster that share a tile, each with its own columns of the head.
constexpr int32_t sharers(const Row& r) { return r.design == Design::kClusterColumns ? kClusterCtas : 1; }

// For each team: one tile of Q and `stages` tiles of K and V, of V with the columns of a slice. If CTAs share
// a query tile, each has Q and P of half of the rows, one tile of K, and `stages` tiles of its columns of V.
constexpr int64_t forward_tile_bytes(const Row& r) {
  if (sharers(r) > 1) {
    const int64_t rows = r.block_m / sharers(r);
    return kElementBytes * (rows * (r.head_dim + r.block_n) +
                            r.block_n * (r.head_dim + int64_t{r.stages} * r.slice_columns()));
  }
  const int32_t d = forward_columns(r.head_dim), dv = forward_columns(r.slice_columns());
  return kElementBytes * (int64_t{r.block_m} * d + int64_t{r.block_n} * r.stages * (d + dv));
}

// Tiles of float8 pages are loaded as they are stored, into stages of their own, and a warpgroup widens them
// to the dtype of the queries.
constexpr bool widens(const Row& r) { return r.takes(DType::kF8E4M3); }
constexpr int32_t stored_stages(const Row& r) { return r.head_dim <= 128 ? 2 : 1; }
constexpr int64_t stored_tile_bytes(const Row& r) {
  return widens(r) ? int64_t{stored_stages(r)} * r.block_n * (r.head_dim + r.value_dim) : 0;
}

// Whether the plain dense kernel stores o by TMA from shared memory; only for tiles where that was measured
// to be faster. Stored tiles leave no room for o.
constexpr bool forward_stores_by_tma(const Row& r) {
  return r.head_dim == 128 && r.value_dim == 128 && r.block_m == 2 * kConsumerRows && !widens(r) &&
         !r.packs_heads();
}
constexpr int64_t forward_output_bytes(const Row& r) {
  return forward_stores_by_tma(r) ? kElementBytes * r.block_m * r.value_dim : 0;
}

constexpr int64_t forward_shared_bytes(const Row& r) {
  return r.teams * (forward_tile_bytes(r) + stored_tile_bytes(r) + forward_output_bytes(r) + kStateBytes);
}

// The backward: K and V of a key tile, `stages` tiles of Q and dO with lse and delta, a few tiles of dS, and
// one more of them, tiles of bias and mask, or a tile's float32 sums of dQ.
inline constexpr int32_t kScoreGradientStages = 3;
inline constexpr int64_t kKeyTileStateBytes = 1024;  // upper bound: barriers and the state of the key tile

// Whether a kernel has tiles of 96 queries, of which its second consumer has 32 rows of dQ. They serve heads
// of 65 to 80 columns.
inline constexpr int32_t k96Queries = 96, kHeadDimOf96Queries = 80;
constexpr bool takes_96_queries(const Row& r) { return r.block_m == k96Queries; }

// Kernels with two tiles of dS, and no room for a bias, have one consumer warpgroup or tiles of 96 queries.
inline constexpr int32_t kFewDsStages = 2;
constexpr bool has_few_ds_stages(const Row& r) { return r.block_n == kConsumerRows || takes_96_queries(r); }

constexpr int64_t backward_shared_bytes(const Row& r) {
  const int64_t rows = r.block_n + int64_t{r.stages} * r.block_m;
  const int64_t ds = kElementBytes * whole_panels(r.block_m, kConsumerRows) * r.block_n,
                score = static_cast<int64_t>(sizeof(float)) * r.block_m * r.head_dim;
  const int64_t statistics = 2 * int64_t{r.stages} * r.block_m;
  // K of the next tile, with 128 queries also V, where one tile of dS is given up for them.
  const int64_t keys = kElementBytes * r.block_n * backward_columns(r.head_dim),
                ahead = r.block_m == kConsumerRows ? ds + keys : ds;
  const int64_t most = ahead > score ? ahead : score;
  const int64_t gradients = has_few_ds_stages(r) ? kFewDsStages * ds : kScoreGradientStages * ds + most;
  return kElementBytes * rows * (backward_columns(r.head_dim) + backward_columns(r.value_dim)) + gradients +
         static_cast<int64_t>(sizeof(float)) * statistics +
         // With 96 queries no unused room of a bias holds what the alignment to 1,024 bytes adds.
         (takes_96_queries(r)                                 ? score + kStateBytes
          : has_few_ds_stages(r) || r.block_m > kConsumerRows ? kKeyTileStateBytes
                                                              : 2 * kKeyTileStateBytes);
}

constexpr bool backward_in_clusters(const Row& r) {
  return r.design == Design::kCluster || r.design == Design::kClusterColumns;
}

// The backward in 2-CTA clusters. A CTA has K and V of its 64 keys, `stages` tiles of Q with lse and delta,
// halves of tiles of dO, tiles of dS, and perhaps its part of dQ in float32. If CTAs split the keys, each
// also has half of the columns of K of the other's keys. If they split the columns, each has the other's
// parts of Sᵀ and dPᵀ in float32. `score_bytes`: the bias and mask of a CTA's keys.
struct BackwardClusterStages {
  int32_t dout_halves, ds;
  bool dq;
};

constexpr int64_t backward_cluster_shared_bytes(const Row& r, BackwardClusterStages has) {
  const int32_t d = r.head_dim / sharers(r), dv = r.value_dim / sharers(r);
  const int64_t keys = kConsumerRows * (int64_t{d} + (r.block_n > kConsumerRows ? d / 2 : 0) + dv);
  const int64_t queries = r.block_m * (int64_t{r.stages} * d + has.dout_halves * dv / 2);
  const int64_t ds = int64_t{has.ds} * r.block_m * r.block_n;
  const int64_t dq = has.dq ? int64_t{r.block_m} * d / (backward_cluster_ctas(r) == 1 ? 4 : 2) : 0,
                parts = sharers(r) > 1 ? 2 * int64_t{r.block_m} * r.block_n : 0,
                statistics = 2 * int64_t{r.stages} * r.block_m;
  return kElementBytes * (keys + queries + ds) +
         static_cast<int64_t>(sizeof(float)) * (dq + parts + statistics) + kStateBytes;
}

// Room for bias and mask.
constexpr int64_t backward_cluster_score_bytes(const Row& r, BackwardClusterStages has) {
  return kMaxSharedBytes - backward_cluster_shared_bytes(r, has);
}

// dO and dS have two stages and dQ is staged, if `score_bytes` leave room. Otherwise these are given up one
// after the other: dQ's staging, half a tile of dO, one tile of dS.
constexpr BackwardClusterStages backward_cluster_stages(const Row& r, int64_t score_bytes) {
  constexpr BackwardClusterStages kFewest{3, 1, false};
  for (const BackwardClusterStages has : {BackwardClusterStages{4, 2, true}, {4, 2, false}, {3, 2, false}}) {
    if (backward_cluster_score_bytes(r, has) >= score_bytes) return has;
  }
  return kFewest;
}

// Whether the plain kernel with packed heads takes draft masks; of wider heads it would spill registers.
constexpr bool plain_takes_drafts(const Row& r) { return r.head_dim <= 128; }

// Whether the plain kernel with packed heads runs a call, which may have windows and sinks.
inline bool takes_plain_packed_heads(const Row& r, const AttentionSpec& spec) {
  return !(spec.softcap > 0) && spec.scale > 0 && !spec.has(Operand::kAlibiSlopes) &&
         (plain_takes_drafts(r) || !spec.has(Operand::kDraftMask));
}

}  // namespace jax_flash::hopper
