// What rounds dQ in the Hopper backward: a kernel of its own, or the CTAs that compute it.
#pragma once

#include <cstdint>

#include "core/families/hopper_layout.h"
#include "core/plan/call.h"
#include "core/plan/launch_plan.h"
#include "core/sizes.h"

namespace jax_flash {

// `plan`: has the grid of key tiles.
class DqRounder {
 public:
  DqRounder(const KernelRow& row, const Call& call, const LaunchPlan& plan)
      : row_(row), call_(call), tiles_(plan.keys.tiles), blocks_(plan.keys.blocks) {
    const Shapes& s = call.shapes;
    plain_ = !hopper::backward_in_clusters(row) && plan.score == ScoreKind::kPlain && !call.spec.packed();
    group_ = s.kv_heads > 0 ? s.heads / s.kv_heads / plan.parts : 1;
  }

  DqRounding best() const {
    if (!plain_ || blocks_ == 0) return DqRounding::kKernel;
    if (tiles_ == 1) return DqRounding::kCtas;
    if (keeps_sums()) return DqRounding::kHeads;
    return fits_clusters() ? DqRounding::kClusters : DqRounding::kKernel;
  }

  // KV heads of all sequences, or parts of their query heads.
  int64_t heads() const { return blocks_ / tiles_; }
  // Whether sequences have lengths or windows of their own.
  bool sequences_differ() const {
    return call_.spec.moves_band() || call_.spec.has(Operand::kQLengths) ||
           call_.spec.has(Operand::kKvLengths);
  }
  // The sums of a KV head.
  int64_t kept_sums_bytes() const {
    const Shapes& s = call_.shapes;
    return group_ * ceil_div(s.q_rows, row_.block_m) * row_.block_m * s.head_dim * int64_t{sizeof(float)};
  }

 private:
  // Whether each CTA goes through all key tiles of a KV head and keeps its sums of dQ. That saves a memset
  // and a kernel. But the CTAs work on more heads at a time than if they shared one: with more than two key
  // tiles, Q, dO and the sums of all heads must stay in L2, unless a causal mask leaves half of the steps.
  // And all SMs must have about as many heads; if sequences differ, several.
  bool keeps_sums() const {
    constexpr int64_t kMostTiles = 4, kMostOfLargeHeads = 2, kLeastWaves = 4, kCachedBytes = 40 << 20;
    const int64_t sms = call_.device.sm_count, waves = ceil_div(heads(), sms);
    if (tiles_ > kMostTiles || 10 * heads() < 9 * waves * sms) return false;
    if (sequences_differ() && waves < kLeastWaves) return false;
    const Shapes& s = call_.shapes;
    const bool causal = call_.spec.left < 0 && call_.spec.right >= 0;
    const int64_t row = hopper::kElementBytes * (s.head_dim + s.value_dim),
                  bytes = group_ * s.q_rows * row + kept_sums_bytes();
    return tiles_ <= kMostOfLargeHeads || causal || sms * bytes <= kCachedBytes;
  }

  // Whether the CTAs of all key tiles of a KV head form a cluster that clears and rounds its dQ. That saves a
  // memset and a kernel, much of the time of a short call. All clusters must run at once, because a CTA has
  // only one tile: of 128 CTAs, clusters of 4 or 8 do not run at once on the 132 SMs of an H200. In a
  // launch without clusters barrier.cluster is __syncthreads, which producers and consumers reach at
  // different times.
  bool fits_clusters() const {
    constexpr int64_t kMostCtas = 4, kMostRows = 2048;  // only these CTAs clear and round
    if (call_.shapes.q_rows > kMostRows) return false;
    if (call_.spec.deterministic || tiles_ > kMostCtas) return false;
    return 2 * blocks_ <= call_.device.sm_count;
  }

  const KernelRow& row_;
  const Call& call_;
  int64_t tiles_, blocks_, group_;
  bool plain_;
};

}  // namespace jax_flash
