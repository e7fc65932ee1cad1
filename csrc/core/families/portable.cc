// The portable family (sm75, sm80 and, by PTX, every newer card): mma.sync and cp.async.
#include <algorithm>
#include <limits>

#include "core/families/decode_parts.h"
#include "core/families/latent.h"
#include "core/families/portable_layout.h"
#include "core/plan/family.h"
#include "core/split.h"

namespace jax_flash {
namespace {

int32_t element_size(const Call& call) { return call.shapes.dtype == DType::kF32 ? 4 : 2; }

// Whether a row of one_tile, which masks element by element and skips nothing, holds all rows of a head.
bool holds_all_rows(const KernelRow& row, const Call& call) {
  const Shapes& s = call.shapes;
  return !call.spec.packed() && !call.spec.has(Operand::kBlockMask) && 0 < s.q_rows &&
         s.q_rows <= row.block_m && 0 < s.k_rows && s.k_rows <= row.block_n;
}

// Adds what segments and ranges leave to the tiles of a grid. Kernels skip tiles of a boolean mask
// themselves.
void add_visible(const Call& call, int64_t rows, TileGrid& grid, Workspace& workspace) {
  if (call.spec.has(Operand::kQSegmentIds) || call.spec.has(Operand::kRanges))
    add_segments(call, rows, grid, workspace);
}

// A pass with a CTA for each query tile and head.
class ByQueryTiles : public PassTraits {
 public:
  bool takes_blocks(const KernelRow&) const override { return true; }

  void plan_grid(const KernelRow& row, const Call& call, Workspace& workspace,
                 LaunchPlan& plan) const override {
    plan.queries = tile_grid(call, call.shapes.q_rows, call.shapes.heads, row.block_m, workspace);
    if (row.is_one_tile()) return;
    add_visible(call, call.shapes.q_rows, plan.queries, workspace);
    add_mask_tiles(call, plan.queries, workspace);
  }

  Dim workspace_bound(const AttentionSpec& spec, const DimShapes& s) const override {
    return schedule_bound(spec, s, s.q_rows) + segments_bound(spec, s, s.q_rows) + mask_tiles_bound(spec, s);
  }
};

class Forward final : public ByQueryTiles {
  // Whether a float32 tile of 128 query rows, which comes first in the table, is worth it. Its warps own 32
  // rows, so that they split K and V half as often (docs/experiments). Fewer tiles than SMs would leave some
  // idle.
  static constexpr int32_t kLargeTile = 128, kSmallTile = 64;  // rows
  static constexpr int64_t kCostOfLargeTile = 16,
                           kCostOfSmallTile = 9;  // their times, relative to each other
  static bool wants_large_tile(const Call& call) {
    const Shapes& s = call.shapes;
    const int64_t rows = call.rows_of_sequence();
    const int64_t tiles = ceil_div(s.q_rows, kLargeTile) * s.heads * call.row_arrays();
    return ceil_div(rows, kLargeTile) * kCostOfLargeTile <= ceil_div(rows, kSmallTile) * kCostOfSmallTile &&
           tiles >= call.device.sm_count;
  }

 public:
  bool serves(const KernelRow& row, const Call& call) const override {
    if (row.is_one_tile()) return holds_all_rows(row, call);
    return !row.takes(DType::kF32) || row.block_m < kLargeTile || wants_large_tile(call);
  }
  // Decode reads the keys once for all query heads of a KV head, and divides them among idle SMs.
  bool beats_decode(const KernelRow& row, const Call& call) const override {
    const Shapes& s = call.shapes;
    return row.is_one_tile() && s.heads == s.kv_heads && call.entries() * s.heads > call.device.sm_count;
  }

  int64_t shared_bytes(const KernelRow& row, const Call& call) const override {
    return forward_shared_bytes(row, element_size(call), call.spec.paged());
  }
};

// CTAs own key tiles and compute their dK and dV. dQ is added to float32 sums; deterministic calls
// compute it in a second kernel, over query tiles. With all keys in one tile dQ is complete.
class Backward final : public PassTraits {
 public:
  // One CTA goes through all query heads of a KV head, which other rows divide among idle SMs.
  bool serves(const KernelRow& row, const Call& call) const override {
    const Shapes& s = call.shapes;
    const bool fills = s.heads == s.kv_heads || call.entries() * s.kv_heads >= call.device.sm_count;
    return !row.is_one_tile() || (fills && holds_all_rows(row, call));
  }
  bool takes_blocks(const KernelRow&) const override { return true; }

  int64_t shared_bytes(const KernelRow& row, const Call& call) const override {
    return backward_shared_bytes(row, element_size(call));
  }

  void plan_grid(const KernelRow& row, const Call& call, Workspace& workspace,
                 LaunchPlan& plan) const override {
    const Shapes& s = call.shapes;
    plan.keys = tile_grid(call, s.k_rows, s.kv_heads, row.block_n, workspace);
    if (row.is_one_tile()) return;
    add_visible(call, s.k_rows, plan.keys, workspace);
    add_mask_tiles(call, plan.keys, workspace);
    if (call.spec.deterministic) {
      plan.queries = tile_grid(call, s.q_rows, s.heads, row.block_m, workspace);
      add_visible(call, s.q_rows, plan.queries, workspace);
      plan.queries.mask_tiles = plan.keys.mask_tiles;
    } else {
      plan.dq_sums = workspace.add(dq_sums_bytes(call.spec, dims_of(s), row.block_m).value());
    }
  }

  Dim workspace_bound(const AttentionSpec& spec, const DimShapes& s) const override {
    const auto tiles = [&](const Dim& rows) {
      return schedule_bound(spec, s, rows) + segments_bound(spec, s, rows);
    };
    return tiles(s.k_rows) + mask_tiles_bound(spec, s) +
           (spec.deterministic ? tiles(s.q_rows) : aligned(dq_sums_bytes(spec, s, kLargestQueryTile)));
  }
};

class BiasGradient final : public PassTraits {
 public:
  bool takes_blocks(const KernelRow&) const override { return true; }

  int64_t shared_bytes(const KernelRow& row, const Call& call) const override {
    return bias_gradient_shared_bytes(row, element_size(call));
  }

  void plan_grid(const KernelRow& row, const Call& call, Workspace& workspace,
                 LaunchPlan& plan) const override {
    plan_bias_tiles(row, call, workspace, plan);
    add_visible(call, call.shapes.q_rows, plan.queries, workspace);
  }

  Dim workspace_bound(const AttentionSpec& spec, const DimShapes& s) const override {
    return segments_bound(spec, s, s.q_rows) + dbias_parts_bound(s);
  }
};

class Tangent final : public ByQueryTiles {
 public:
  int64_t shared_bytes(const KernelRow& row, const Call& call) const override {
    return tangent_shared_bytes(row, element_size(call));
  }
};

class LatentDecode final : public latent::Decode {
 public:
  int64_t shared_bytes(const KernelRow& row, const Call&) const override {
    return latent::portable_bytes(row) + latent::kStateBytes;
  }
};

// Limits of the calls that decode serves, and of its grid.
constexpr int64_t kMostRowsDense = 16;  // kMostDecodeRows without pages
// Calls with few tokens decode even if many query heads share a KV head: decode reads each key once for every
// kMostTile rows, but the forward, whose tiles have rows of one head only, once for each query head.
constexpr int64_t kFewTokens = 8, kMostRowsOfFewTokens = 1024;
constexpr int64_t kMostTile = 32, kLeastTile = 8;  // query rows of a column
constexpr int64_t kLeastKeys = 32;                 // keys per key tile
constexpr int64_t kMostBlocks = 1024;              // most CTAs of a grid that splits sequences
constexpr int64_t kSplitKeys = 2048;               // keys per split in batch-invariant mode

// The most query rows of a KV head that decode serves. Packed sequences may have one token.
int64_t most_rows(const AttentionSpec& spec, const Dim& tokens) {
  if (spec.packed() || !tokens.known() || tokens.value() <= kFewTokens) return kMostRowsOfFewTokens;
  return spec.paged() ? kMostDecodeRows : kMostRowsDense;
}

// The number of CTAs of a column: one wave, or a few waves if one would leave SMs idle.
int32_t ranges_of_column(int64_t columns, int64_t wave) {
  const auto efficiency = [&](int64_t ranges) {
    const int64_t blocks = columns * ranges;
    return static_cast<double>(blocks) / static_cast<double>(ceil_div(blocks, wave) * wave);
  };
  constexpr double kGain = 1.05;  // smallest gain that justifies more CTAs
  int64_t best = std::max<int64_t>(1, wave / columns);
  for (int64_t ranges = best + 1; ranges * columns <= kMostBlocks && ranges <= 4 * wave / columns; ++ranges) {
    if (efficiency(ranges) > efficiency(best) * kGain) best = ranges;
  }
  return static_cast<int32_t>(best);
}

// Calls with few query rows per KV head are memory-bound: every key is read once. Latent rows run another
// kernel.
class Decode final : public PassTraits {
 public:
  bool serves(const KernelRow& row, const Call& call) const override {
    if (row.is_latent()) return latent_.serves(row, call);
    const AttentionSpec& spec = call.spec;
    const Shapes& s = call.shapes;
    if (!decode_reads(call, row) || spec.layout == Layout::kVarlen) return false;
    if (call.float8_pools() && !call.float8_chunks_are_whole()) return false;
    const int64_t rows = call.rows_of_group(), entries = call.entries();
    // A tile twice as large as needed wastes half of every product.
    if (row.block_m > 8 && rows <= row.block_m / 2) return false;
    return 0 < s.q_rows && 0 < rows && rows <= most_rows(spec, s.q_rows) && 0 < entries &&
           entries <= std::numeric_limits<int32_t>::max();
  }

  bool takes_blocks(const KernelRow&) const override { return true; }
  bool runs_every_sequence(const KernelRow& row) const override { return row.is_latent(); }

  int64_t shared_bytes(const KernelRow& row, const Call& call) const override {
    if (row.is_latent()) return latent_.shared_bytes(row, call);
    return decode_shared_bytes(row, element_size(call));
  }

  bool better(const KernelRow& a, const KernelRow& b, const Call& call) const override {
    if (a.is_latent()) return latent_.better(a, b, call);
    return a.block_m > b.block_m;
  }

  void plan_grid(const KernelRow& row, const Call& call, Workspace& workspace,
                 LaunchPlan& plan) const override {
    if (row.is_latent()) return latent_.plan_grid(row, call, workspace, plan);
    const AttentionSpec& spec = call.spec;
    const Shapes& s = call.shapes;
    DecodeGrid& grid = plan.decode;
    const int64_t tiles = ceil_div(std::max<int64_t>(s.k_rows, 1), row.block_n);
    const int64_t chunks = ceil_div(call.rows_of_group(), row.block_m);
    grid.columns = static_cast<int32_t>(s.kv_heads * chunks);
    if (spec.packed()) grid.packed_rows = static_cast<int32_t>(chunks * row.block_m);
    const int64_t wave = std::min<int64_t>(int64_t{call.device.sm_count} * row.blocks, kMostBlocks);
    grid.ranges =
        static_cast<int32_t>(std::min<int64_t>(ranges_of_column(grid.columns, wave), call.entries() * tiles));
    plan_parts(row, call, call.entries(), kSplitKeys, workspace, grid);
  }

  Dim workspace_bound(const AttentionSpec& spec, const DimShapes& s) const override {
    if (spec.layout == Layout::kVarlen) return 0;
    return max(latent_.workspace_bound(spec, s), bound_of_split_keys(spec, s));
  }

 private:
  static Dim bound_of_split_keys(const AttentionSpec& spec, const DimShapes& s) {
    Dim group = 1;
    if (!s.kv_heads.known() || s.kv_heads.value() > 0) group = s.heads / s.kv_heads;
    const Dim rows =
        spec.packed() ? max(group * max(s.draft_rows, 1), average_rows(s, group)) : group * s.q_rows;
    const Dim& least = spec.packed() ? group : rows;
    const int64_t most = most_rows(spec, s.q_rows);
    if (least.known() && least.value() > most) return 0;
    const Dim column_rows = s.kv_heads * (min(rows, most) + (kMostTile - 1));
    const Dim entries = s.leading * s.batch;
    Dim split_rows = 0;
    if (spec.num_splits > 0) {
      split_rows = entries * column_rows * std::min(spec.num_splits, kMaxSplits);
    } else if (spec.batch_invariant) {
      split_rows = entries * column_rows * (s.k_rows / kSplitKeys + 1);
    } else {
      split_rows = min(kMostBlocks * kMostTile, entries * (s.k_rows / kLeastKeys + 1) * column_rows) * 2;
    }
    const Dim columns = s.kv_heads * ((min(rows, most) + (kLeastTile - 1)) / kLeastTile);
    return aligned(partial_bytes(split_rows, s.value_dim)) +
           aligned(decode_lists_bytes(spec, entries, columns, s.k_rows, kLeastKeys));
  }

  // An upper bound of the rows of packed sequences of average length that decode takes.
  static Dim average_rows(const DimShapes& s, const Dim& group) {
    return min(group * (s.q_rows / max(s.batch, 1) + 1), Dim(kMostDecodeRows));
  }

  LatentDecode latent_;
};

}  // namespace

namespace families {

const Family& portable() {
  static const Forward forward;
  static const Backward backward;
  static const BiasGradient bias_gradient;
  static const Decode decode;
  static const Tangent tangent;
  static const Family family{&forward, &backward, &bias_gradient, &decode, &tangent};
  return family;
}

}  // namespace families
}  // namespace jax_flash
