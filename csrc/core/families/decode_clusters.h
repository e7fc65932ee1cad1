// Decode of few and short sequences on sm_90a, in which each KV head of a sequence has a cluster of CTAs
// (cuda/decode/hopper_cluster.cuh). Plan and kernel share this file: the layout of a CTA's shared memory, and
// the calls that the kernel serves.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/families/portable_layout.h"
#include "core/plan/call.h"
#include "core/plan/row.h"

namespace jax_flash::clusters {

inline constexpr int32_t kMostCtas = 16;   // CTAs per cluster
inline constexpr int32_t kMostTiles = 64;  // tiles per CTA, if only the device knows their number

// Shared-memory offsets; the merge buffer aliases the ring.
struct Layout {
  int32_t warp_ring, merge_o, merge_softmax;
  // Partial results that the n CTAs of the cluster send to this one, which merges them. parts: O of this
  // CTA's items as [items, n] float4, an item being four columns of a row; softmax: m and l of all rows as
  // [M, n].
  int32_t parts, softmax;
  int32_t barrier;  // counts the bytes that arrive in `parts` and `softmax`
  int32_t entries;  // block-table entries of each thread's keys in the ring
  int32_t bytes;
};

constexpr Layout layout(const Row& r, int32_t element_size) {
  constexpr int32_t kSoftmax = 2 * int32_t{sizeof(float)};
  Layout at{};
  at.warp_ring = r.stages * (r.block_n / r.warps) * (r.head_dim + r.value_dim) * element_size;
  at.merge_softmax = r.warps * at.warp_ring;
  at.parts = at.merge_softmax + r.warps * r.block_m * kSoftmax;
  at.softmax = at.parts + r.block_m * r.value_dim * int32_t{sizeof(float)};
  at.barrier = at.softmax + r.block_m * kMostCtas * kSoftmax;
  at.entries = at.barrier + kMbarrierBytes;
  at.bytes = at.entries + r.stages * r.warps * 32 * int32_t{sizeof(int32_t)};
  return at;
}

// How a row would launch a call, and whether that is faster. Every KV head of every sequence has a cluster.
class Choice {
 public:
  Choice(const KernelRow& row, const Call& call)
      : call_(call),
        clusters_(call.entries() * call.shapes.kv_heads),
        tiles_(ceil_div(std::max<int64_t>(call.visible_keys(), 1), row.block_n)),
        wave_(int64_t{call.device.sm_count} * row.blocks) {}

  // CTAs of a cluster, a power of two. All clusters must be co-resident; those of more than 2 CTAs reach only
  // half of the SMs. Each CTA has at least one tile, or two in clusters of 16.
  int32_t size() const {
    int32_t ctas = 1;
    while (ctas < kMostCtas) {
      const int32_t larger = 2 * ctas;
      if (clusters_ * larger > (larger > 2 ? wave_ / 2 : wave_) || larger * (larger > 8 ? 2 : 1) > tiles_)
        break;
      ctas = larger;
    }
    return ctas;
  }

  // Whether the kernel chooses the algorithm, because only the device knows the lengths, or a window, of long
  // sequences. Clusters run if these see about equally many keys, and not too many. Otherwise each CTA works
  // on an equal range of all keys, so that none waits for the longest sequence.
  bool asks_for_lengths() const {
    return !knows_keys() && (call_.device.always_cluster || ceil_div(tiles_, size()) > kManyTiles);
  }

  // Whether clusters are faster than the portable decode.
  bool is_faster() const {
    constexpr int64_t kFewTiles = 8;  // tiles per CTA
    constexpr double kFilled = 0.9;   // least share of the SMs, or of the waves, that must have a CTA
    if (clusters_ == 0 || tiles_ == 0) return false;
    const int64_t ctas = size(), tiles = ceil_div(tiles_, ctas), sms = call_.device.sm_count;
    if (call_.device.always_cluster) return true;
    // Alone on an SM, CTAs that take equal shares are as fast as clusters of one.
    const bool asks_for_window =
        call_.spec.has(Operand::kWindowLeft) && (ctas >= 2 || (knows_lengths() && wave_ > sms));
    if (tiles > kManyTiles && !asks_for_window && (knows_keys() ? ctas > 2 : ctas != 2 || tiles > kMostTiles))
      return false;
    if (clusters_ > wave_) return fills(clusters_, ceil_div(clusters_, wave_) * wave_, kFilled);
    return tiles <= kFewTiles || fills(clusters_ * ctas, sms, kFilled);
  }

 private:
  static constexpr int64_t kManyTiles = 16;  // tiles per CTA

  static bool fills(int64_t part, int64_t whole, double least) {
    return static_cast<double>(part) >= least * static_cast<double>(whole);
  }
  bool knows_lengths() const {
    return !call_.spec.paged() && !(call_.spec.operands & bits_of(Operand::kQLengths, Operand::kKvLengths));
  }
  bool knows_keys() const { return knows_lengths() && !call_.spec.moves_band(); }

  const Call& call_;
  int64_t clusters_, tiles_, wave_;
};

// With asks_for_lengths() both code paths share one buffer, sized for the larger.
inline int64_t shared_bytes(const KernelRow& row, const Call& call) {
  const int64_t in_clusters = layout(row, 2).bytes;
  if (!Choice(row, call).asks_for_lengths()) return in_clusters;
  return std::max<int64_t>(in_clusters, decode_layout(row, 2).bytes) + kBlockStateBytes;
}

// Whether a row runs a call and is faster than the portable decode.
inline bool serves(const KernelRow& row, const Call& call) {
  constexpr int64_t kPadding = 32;  // most columns that a head dim is padded by
  const AttentionSpec& spec = call.spec;
  const Shapes& s = call.shapes;
  constexpr int32_t kOfClusters = kOfDecode & ~bits_of(Operand::kBlockMask, Operand::kMask);
  if (spec.operands & ~kOfClusters || spec.layout == jax_flash::Layout::kVarlen || spec.num_splits > 0 ||
      spec.batch_invariant || s.q_rows == 0)
    return false;
  if (s.head_dim + kPadding <= row.head_dim || s.value_dim + kPadding <= row.value_dim) return false;
  const int64_t rows = call.rows_of_group(), least = row.block_m > 8 ? row.block_m / 2 : 0;
  return least < rows && rows <= row.block_m && Choice(row, call).is_faster();
}

}  // namespace jax_flash::clusters
