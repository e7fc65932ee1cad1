// The order of the key tiles of cuda/backward/hopper.cuh: how many heads' tiles run together, and which come
// first.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/plan/launch_plan.h"
#include "core/plan/workspace.h"
#include "cuda/backward/hopper_key_tile.cuh"
#include "cuda/backward/query_sums.cuh"
#include "cuda/hopper/tile_scheduler.cuh"
#include "cuda/launch.h"
#include "cuda/work.cuh"

namespace jax_flash {

// Bytes of Q, dO and the dQ accumulator of one KV head.
inline int64_t head_bytes(const Problem& p) {
  const int64_t row = 2 * (p.head_dim + p.value_dim) + 4 * p.head_dim;
  return std::max<int64_t>(1, row * p.q_rows * (p.heads / p.kv_heads));
}

// How many KV heads' tiles are worked on together: few, so that Q, dO and the sums of dQ stay in L2. With a
// band tiles differ in length, and more heads leave short tiles for the end.
//
// In a deterministic call a tile waits for those of its head that began before it. The more heads are worked
// on together, the later it begins. Tiles that have few steps need more heads.
inline uint32_t backward_heads_together(const Problem& p, int32_t block_m, uint32_t cluster_size) {
  const bool uneven = p.uneven();
  if (!p.spec.deterministic) return uneven ? 4 : 2;
  const uint32_t least = uneven ? 32 : cluster_size > 1 ? 16 : 8, all_steps = uneven ? 512 : 256;
  const auto steps = static_cast<uint32_t>(std::max<int64_t>(1, ceil_div(mean_queries(p), block_m)));
  return std::max(p.q_segment_ids ? 2 * least : least, all_steps / steps) / cluster_size;
}

// For long causal sequences with GQA, if workers cover all tiles of a KV head. Key tiles see different
// numbers of queries, so CTAs would drift to different query heads, more than L2 holds. Instead, as many KV
// heads as the workers cover go back and forth through the query tiles together, each time with all query
// heads of a group.
inline void keep_in_step(PersistentTiles& tiles, const Problem& p, int32_t workers) {
  constexpr int64_t kManyBytes = 16 << 20;
  const bool windowed = p.spec.left >= 0 || p.window_left,
             causal = !windowed && (p.spec.right >= 0 || p.ranges);
  if (p.packed() || !causal || p.heads == p.kv_heads || head_bytes(p) < kManyBytes) return;
  if (p.spec.deterministic || tiles.tiles_per_head > workers) return;
  tiles.back_and_forth = true;
  tiles.heads.size = static_cast<uint32_t>(workers / std::max(1, tiles.tiles_per_head));
}

// The number of KV heads that have about one tile for each worker, in groups of equal size. With more heads
// together, Q, dO and the sums of dQ would not stay in L2.
inline uint32_t heads_of_one_wave(const PersistentTiles& tiles, int32_t workers) {
  return equal_group(tiles.count / tiles.tiles_per_head,
                     static_cast<uint32_t>(std::max(1, workers / tiles.tiles_per_head)));
}

// Whether the key tiles of a deterministic call may add to dQ in descending order (descend()): those of a
// causal call, if each sees the queries from its diagonal on.
inline bool may_descend(const Problem& p) { return first_tile_stores(p) && p.spec.right >= 0; }

// log2 of the query tiles that a ticket of a deterministic call covers. Each key tile is one ticket behind
// the key tile before it, so a sequence has at least 16 tickets, or 8 with clusters, to which a ticket costs
// more.
template <class C>
int32_t ticket_shift(const Problem& p) {
  if (may_descend(p) && C::kM >= C::kN) return 0;  // a key tile begins only one query tile ahead
  const int64_t tickets = kInClusters<C> ? 8 : 16;
  const int32_t heads = kInClusters<C> ? p.heads / p.kv_heads : 1;
  int32_t shift = kInClusters<C> && p.spec.right < 0 ? kClusterTicketShift : kMostTicketShift;
  while (shift > 0 && (mean_queries(p) < (tickets * C::kM) << shift || heads << shift > kTicketSteps))
    --shift;
  return shift;
}

// For deterministic causal calls, in which key tiles wait for those of their head that add to dQ before them.
// In descending order a key tile begins C::kN rows ahead of the one whose sums it waits for. It seldom waits
// if it begins so many steps later that it stays a ticket and two query tiles behind. A head's tiles have on
// average half as many steps as the head has query tiles, and in that time the workers take a tile each. So a
// group has more heads than one wave, as far as their Q, dO and sums stay in L2. Only the last group keeps
// the ascending order, which ends with short tiles.
template <class C>
void descend(PersistentTiles& tiles, const Problem& p, int32_t workers, int32_t ticket_shift) {
  constexpr int64_t kMostBytes = 32 << 20;
  // The rows that a key tile falls behind if a group has one wave of heads.
  constexpr int32_t kRowsOfOneWave = C::kN / 2;
  const int32_t behind = ((1 << ticket_shift) + 2) * C::kM - C::kN;
  const uint32_t one = heads_of_one_wave(tiles, workers), heads = tiles.count / tiles.tiles_per_head;
  const auto most = static_cast<uint32_t>(kMostBytes / head_bytes(p));
  const uint32_t size = std::min(std::max(one * behind / kRowsOfOneWave, 2u), most);
  const uint32_t last = std::max({one, size / 2, 2u});
  if (most < one || heads <= last) return;
  tiles.descends = true;
  tiles.heads.size = std::min(size, heads - last);
  tiles.heads.last = (heads - last) / tiles.heads.size * tiles.heads.size;
}

// Decides which heads' tiles run together, unless steps are listed: there a kernel orders the tiles of a
// group.
template <class C>
void order_tiles(PersistentTiles& tiles, const Problem& p, const LaunchPlan& plan, int32_t ticket_shift) {
  const int32_t workers = plan.persistent_ctas / C::kCluster;
  tiles.heads.size = backward_heads_together(p, C::kM, C::kCluster);
  keep_in_step(tiles, p, workers);
  if constexpr (kMayOrder<C>)
    if (plan.dq_tickets >= 0 && may_descend(p)) descend<C>(tiles, p, workers, ticket_shift);
  if (tiles.back_and_forth || p.spec.deterministic || !(p.uneven() || p.mask)) return;
  // A long tile that starts late would be the last to end. So the last heads, as many as have two tiles for
  // each worker, or one where two would not stay in L2, are one group, which ends with its short tiles.
  constexpr int64_t kMostBytes = 64 << 20;
  const uint32_t one = heads_of_one_wave(tiles, workers), two = heads_of_one_wave(tiles, 2 * workers);
  const uint32_t last = two * head_bytes(p) <= kMostBytes ? two : one;
  const uint32_t others = tiles.count / tiles.tiles_per_head - last;
  tiles.heads.last = others / tiles.heads.size * tiles.heads.size;
}

}  // namespace jax_flash
