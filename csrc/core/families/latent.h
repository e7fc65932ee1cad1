// Host side of decode over latent pools, for the families that have a kernel for it (latent_layout.h).
#pragma once

#include <algorithm>
#include <limits>

#include "core/families/decode_parts.h"
#include "core/families/latent_layout.h"
#include "core/plan/family.h"
#include "core/sequence.h"

namespace jax_flash::latent {

inline constexpr int64_t kMostBlocks = 256;                // CTAs, one per SM
inline constexpr int64_t kMostRows = 64, kLeastRows = 16;  // query rows per chunk
inline constexpr int64_t kLeastKeys = 16;                  // keys per key tile
// Tiles per CTA, because merging a part costs as much as some tiles.
inline constexpr int64_t kLeastTiles = 4;
inline constexpr int64_t kSplitKeys = 2048;  // keys per split in batch-invariant mode
// Tokens over contiguous keys. With more, the forward's query tiles, whose rows belong to one head, are full.
inline constexpr int64_t kMostTokens = 64;

class Decode : public PassTraits {
 public:
  // Whether calls with such keys run the latent kernels, provided they were built. Contiguous keys that are
  // also the values are read as pools are, one page for each sequence, if there are few tokens.
  static bool are_latent(const AttentionSpec& spec, const DimShapes& s) {
    return spec.shared_kv() && spec.value_start == 0 && s.head_dim.known() &&
           s.head_dim.value() >= kFewestColumns &&
           (spec.paged() || (!spec.packed() && has_few_tokens(s.q_rows)));
  }

  bool serves(const KernelRow& row, const Call& call) const override {
    const Shapes& s = call.shapes;
    return row.is_latent() && decode_reads(call, row) && are_latent(call.spec, dims_of(s)) && s.heads > 0 &&
           s.kv_heads > 0 && s.batch > 0 && entries(call, kMostRows) <= std::numeric_limits<int32_t>::max();
  }
  bool runs_every_sequence(const KernelRow&) const override { return true; }

  // Prefers the smallest chunk that holds all query rows of a KV head, or the largest one if none does.
  bool better(const KernelRow& a, const KernelRow& b, const Call& call) const override {
    if (a.block_m != b.block_m)
      return (a.block_m > b.block_m) == (rows_of(call) > std::min(a.block_m, b.block_m));
    return a.block_n > b.block_n;
  }

  void plan_grid(const KernelRow& row, const Call& call, Workspace& workspace,
                 LaunchPlan& plan) const override {
    const AttentionSpec& spec = call.spec;
    const Shapes& s = call.shapes;
    if (spec.packed()) plan.queries = tile_grid(call, s.q_rows, s.heads, row.block_m, workspace);
    const int64_t all = entries(call, row.block_m),
                  tiles = ceil_div(std::max<int64_t>(s.k_rows, 1), row.block_n);
    DecodeGrid& grid = plan.decode;
    grid.columns = static_cast<int32_t>(s.kv_heads);
    const int64_t wave = std::min<int64_t>(int64_t{call.device.sm_count} * row.blocks, kMostBlocks);
    const int64_t most = ceil_div(all * tiles, kLeastTiles);
    grid.ranges = static_cast<int32_t>(std::min(std::max<int64_t>(1, wave / s.kv_heads), most));
    // With this rule, entries of equal length are cut into the same number of equal parts.
    constexpr int64_t kMostLost = 16;  // at most 1 / kMostLost of the CTAs may idle
    const int64_t whole = all > 0 ? grid.ranges / all * all : 0;
    if (whole > 0 && (grid.ranges - whole) * kMostLost <= grid.ranges)
      grid.ranges = static_cast<int32_t>(whole);
    if (spec.packed()) grid.packed_rows = std::numeric_limits<int32_t>::max();
    plan_parts(row, call, all, kSplitKeys, workspace, grid);
  }

  Dim workspace_bound(const AttentionSpec& spec, const DimShapes& s) const override {
    if (!are_latent(spec, s)) return 0;
    const Dim group = s.kv_heads.known() && s.kv_heads.value() == 0 ? Dim(0) : s.heads / s.kv_heads;
    // Upper bound: at least one chunk per token, with the smallest chunk size.
    const Dim tokens = spec.packed() ? s.q_rows + s.batch : s.batch * s.q_rows;
    const Dim rows = s.leading * tokens * (group / kMostRows + 1) * s.kv_heads * kMostRows;
    const Dim slots = spec.num_splits > 0    ? Dim(std::min(spec.num_splits, kMaxSplits))
                      : spec.batch_invariant ? s.k_rows / kSplitKeys + 1
                                             : Dim(0);
    const bool fixed = spec.num_splits > 0 || spec.batch_invariant;
    const Dim split_rows =
        fixed ? rows * slots : min(kMostBlocks * kMostRows, rows * (s.k_rows / kLeastKeys + 1)) * 2;
    const Dim chunks = s.leading * tokens * ((group + (kLeastRows - 1)) / kLeastRows);
    return aligned(partial_bytes(split_rows, s.value_dim)) + schedule_bound(spec, s, s.q_rows) +
           aligned(decode_lists_bytes(spec, chunks, s.kv_heads, s.k_rows, kLeastKeys));
  }

 protected:
  ~Decode() = default;

  // Query rows of a KV head that a chunk may hold together.
  static int64_t rows_of(const Call& call) {
    return call.shapes.heads / call.shapes.kv_heads * (call.spec.packed() ? 1 : call.shapes.q_rows);
  }

 private:
  static bool has_few_tokens(const Dim& tokens) { return !tokens.known() || tokens.value() <= kMostTokens; }
  // The number of chunks of `rows` query rows that all sequences have for one KV head.
  static int64_t entries(const Call& call, int64_t rows) {
    const Shapes& s = call.shapes;
    const Chunks chunks(s.heads / s.kv_heads, static_cast<int32_t>(rows));
    const int64_t token_chunks =
        call.spec.packed() ? s.q_rows / chunks.tokens + s.batch : s.batch * ceil_div(s.q_rows, chunks.tokens);
    return s.q_rows == 0 ? 0 : s.leading * token_chunks * chunks.heads;
  }
};

}  // namespace jax_flash::latent
