// The Hopper family (sm90): wgmma, TMA and mbarrier pipelines.
#include <algorithm>

#include "core/families/decode_clusters.h"
#include "core/families/decode_parts.h"
#include "core/families/dq_rounding.h"
#include "core/families/head_parts.h"
#include "core/families/hopper_layout.h"
#include "core/families/hopper_tiles.h"
#include "core/families/latent.h"
#include "core/families/packed_heads.h"
#include "core/plan/choose.h"
#include "core/plan/family.h"

namespace jax_flash {
namespace {

using hopper::kConsumerRows;
static_assert(kConsumerRows == kSegmentPart);
constexpr int64_t kCounterBytes = 4;

// Plans as many persistent CTAs as fit, for `blocks` tiles of `steps` keys or rows. Tiles of unequal length
// and long tiles are handed out by a counter in memory, whose cost is negligible for long ones. If another
// kernel occupies some SMs, as NCCL's do in a ring, CTAs that start late then take fewer tiles
// (docs/experiments/ring.md).
void plan_persistent(int64_t blocks, bool unequal, int64_t steps, const KernelRow& row, const Call& call,
                     Workspace& workspace, LaunchPlan& plan) {
  const int64_t cluster = plan.cluster_size,
                most = int64_t{call.device.sm_count} / cluster * cluster * row.blocks;
  plan.persistent_ctas = static_cast<int32_t>(std::min(blocks, most));
  if ((unequal || steps >= hopper::kLongTile) && blocks > most * row.teams)
    plan.tile_counter = workspace.add(kCounterBytes);
}

class Forward final : public PassTraits {
 public:
  // Tensor maps have room for one leading dimension. Over pages a TMA box is a multiple of 8 rows of a page.
  bool serves(const KernelRow& row, const Call& call) const override {
    if (call.shapes.page_size % 8) return false;
    if (hopper::widens(row) != call.float8_pools()) return false;
    if (call.float8_pools() && !call.float8_chunks_are_whole()) return false;
    if (call.device.sm_count < hopper::sharers(row)) return false;
    if (row.block_m == kThreeConsumers && call.spec.has(Operand::kBlockMask) && !fills_three(call))
      return false;
    return row.packs_heads() ? packed_heads::serves(row, call) : call.shapes.leading_rank <= 1;
  }
  bool beats_decode(const KernelRow& row, const Call& call) const override {
    return row.packs_heads() && packed_heads::beats_decode(row, call);
  }

  int64_t shared_bytes(const KernelRow& row, const Call&) const override {
    return hopper::forward_shared_bytes(row);
  }

  bool better(const KernelRow& a, const KernelRow& b, const Call& call) const override {
    if (a.packs_heads() && b.packs_heads())
      return packed_heads::Tiles(a, call).time < packed_heads::Tiles(b, call).time;
    if (call.spec.paged()) return false;
    if (call.spec.has(Operand::kBlockMask)) return a.block_m > b.block_m;
    const hopper::Consumers best = hopper::TileChoice(call).best(), has = hopper::consumers_of(a),
                            other = hopper::consumers_of(b);
    return has != other && (has == best || (other != best && other == hopper::Consumers::kOne));
  }

  void plan_grid(const KernelRow& row, const Call& call, Workspace& workspace,
                 LaunchPlan& plan) const override {
    const Shapes& s = call.shapes;
    if (lists_tiles(plan.score) && s.kv_heads > 0) {
      const int32_t rows = rows_of_lists(row, call, plan.score), consumers = row.block_m / kConsumerRows;
      const int64_t slots = slots_of_group(static_cast<int32_t>(s.heads / s.kv_heads), rows, consumers);
      plan.queries = tile_grid(call, s.q_rows, s.kv_heads * slots, rows, workspace);
      plan.queries.consumers = consumers;
    } else {
      const auto of_tile = static_cast<int32_t>(row.packs_heads() ? s.heads / s.kv_heads : 1);
      plan.queries = tile_grid(call, s.q_rows, s.heads / of_tile, row.block_m / of_tile, workspace);
    }
    const int32_t multicast = uses_clusters(row, call, plan) ? row.multicast : 1;
    plan.cluster_size = multicast * hopper::sharers(row);
    const bool unequal = call.tiles_differ() || lists_tiles(plan.score) || s.q_rows % row.block_m;
    const TileGrid& grid = plan.queries;
    const int64_t blocks = grid.blocks == 0 ? 0
                                            : grid.blocks / grid.tiles * ceil_div(grid.tiles, multicast) *
                                                  plan.cluster_size * packed_heads::slices(row, call);
    if (plan.score == ScoreKind::kRanges) {
      add_ranges(call, s.q_rows, row.block_n, plan.queries, workspace);
    } else if (lists_tiles(plan.score)) {
      add_key_lists(call, row.block_n, plan.queries, workspace);
    } else {
      add_mask_words(call, plan.queries, workspace);
      // If only a mask hides keys, and rows share it, parts of a tile see no fewer keys than the tile.
      const bool parts =
          call.spec.operands & bits_of(Operand::kQSegmentIds, Operand::kRanges) || s.mask.rows > 1;
      add_segments(call, s.q_rows, plan.queries, workspace, parts);
    }
    plan_persistent(blocks, unequal, call.visible_keys(), row, call, workspace, plan);
  }

  Dim workspace_bound(const AttentionSpec& spec, const DimShapes& s) const override {
    return schedule_bound(spec, s, s.q_rows, packed_heads::least_tokens(s)) +
           max(max(segments_bound(spec, s, s.q_rows), ranges_bound(spec, s, s.q_rows)),
               key_lists_bound(spec, s)) +
           mask_words_bound(spec, s) + aligned(kCounterBytes);
  }

 private:
  static constexpr int32_t kThreeConsumers = 3 * kConsumerRows;
  // The number of query rows from which a listed tile takes its consumers' parts (KeyLists). With small
  // blocks the consumers take the same rows of different heads of a KV head, which often see the same keys,
  // because neighbouring rows of one head may belong to different blocks.
  static int32_t rows_of_lists(const KernelRow& row, const Call& call, ScoreKind score) {
    const bool small = score == ScoreKind::kBlocks && call.spec.block_rows % (2 * kRowBlock) != 0;
    const bool whole = row.block_m == kThreeConsumers || call.shapes.heads / call.shapes.kv_heads % 2 == 0;
    return small && whole ? kRowBlock : 2 * kRowBlock;
  }
  // Whether query tiles with three consumers would leave at most one of nine consumers without rows. The rows
  // of a consumer, and the keys of a piece, must each lie in one block.
  static bool fills_three(const Call& call) {
    const Shapes& s = call.shapes;
    if (s.kv_heads == 0 || call.spec.block_rows % kRowBlock || call.spec.block_keys % kRowBlock) return false;
    const int64_t parts = s.heads / s.kv_heads * (call.spec.block_rows % (2 * kRowBlock) ? 1 : 2);
    return 9 * parts >= 8 * ceil_div(parts, 3) * 3;
  }
  // Multicast halves the loads of K and V. At settled power that pays if rows see many keys (K of 4 MB), with
  // a full or causal mask. With a window or lengths, the two CTAs of a cluster have tiles of different
  // lengths, and more SMs idle at the end. An odd number of tiles leaves one CTA of the last cluster idle.
  static bool uses_clusters(const KernelRow& row, const Call& call, const LaunchPlan& plan) {
    if (row.multicast == 1 || plan.score != ScoreKind::kPlain || call.spec.packed() || call.spec.paged())
      return false;
    constexpr int64_t kManyElements = 1 << 21, kManyTiles = 16;
    const bool whole =
        call.spec.left < 0 && !(call.spec.operands & bits_of(Operand::kQLengths, Operand::kKvLengths,
                                                             Operand::kWindowLeft, Operand::kWindowRight));
    const bool many = whole && call.visible_keys() * row.head_dim >= kManyElements;
    return call.device.always_cluster ||
           (many && (plan.queries.tiles % 2 == 0 || plan.queries.tiles > kManyTiles));
  }
};

// Whether the row's kernel of a gradient can stage tiles of the bias. A float32 one has kernels of its own.
bool stages_bias(const KernelRow& row, const Call& call) {
  ScoreKind score;
  return call.shapes.bias_in_chunks &&
         (!call.shapes.float_bias || (find_score(row, call, score) && score == ScoreKind::kFloatBias));
}

// Whether the row's kernel of a gradient stages tiles of the mask; others read its elements or bits.
bool stages_mask(const KernelRow& row, const Call& call) {
  ScoreKind score;
  return call.spec.has(Operand::kMask) && (!find_score(row, call, score) || jax_flash::stages_mask(score));
}

// CTAs own key tiles, compute their dK and dV, and add dQ to float32 sums, in key-tile order if the
// call is deterministic. The portable rows run
// - calls without queries, for which no tensor map can be made;
// - calls whose bias or mask cannot be copied 8 keys at a time, except a boolean mask whose tiles are listed;
// - calls with a bias or mask and further options at the head dims of the cluster kernels.
class Backward final : public PassTraits {
 public:
  bool serves(const KernelRow& row, const Call& call) const override {
    const AttentionSpec& spec = call.spec;
    if (hopper::backward_in_clusters(row) && stages_tiles(row, call)) {
      ScoreKind score;
      if (!find_score(row, call, score) || (score != ScoreKind::kBias && score != ScoreKind::kMask))
        return false;
    }
    if (hopper::takes_96_queries(row) && !wants_96_queries(call)) return false;
    if (spec.has(Operand::kBlockMask) && !lists_steps(row, call)) return false;
    if (spec.has(Operand::kBias) && !stages_bias(row, call)) return false;
    if (stages_mask(row, call) && !call.shapes.mask_in_chunks) return false;
    return call.shapes.q_rows > 0 && call.device.sm_count >= cluster_of(row);
  }

  int64_t shared_bytes(const KernelRow& row, const Call& call) const override {
    if (!hopper::backward_in_clusters(row)) return hopper::backward_shared_bytes(row);
    if (stages_tiles(row, call)) return hopper::kMaxSharedBytes;
    return hopper::backward_cluster_shared_bytes(row, hopper::backward_cluster_stages(row, 0));
  }

  // Where blocks are smaller than a tile, each consumer of a larger key tile would skip most steps of the
  // other. Two CTAs per SM with one consumer each have steps of their own.
  bool better(const KernelRow& a, const KernelRow& b, const Call& call) const override {
    if (!call.spec.has(Operand::kBlockMask) || a.block_n == b.block_n) return false;
    const KernelRow& large = a.block_n > b.block_n ? a : b;
    const bool fits = call.spec.block_rows % large.block_m == 0 && call.spec.block_keys % large.block_n == 0;
    return (&a == &large) == fits;
  }

  void plan_grid(const KernelRow& row, const Call& call, Workspace& workspace,
                 LaunchPlan& plan) const override {
    const Shapes& s = call.shapes;
    plan.parts = lists_tiles(plan.score) ? 1 : HeadParts(row, call).best();
    plan.keys = tile_grid(call, s.k_rows, s.kv_heads * plan.parts, row.block_n, workspace);
    if (plan.parts > 1)
      plan.part_sums = workspace.add(part_gradients_bytes(call.spec, dims_of(s), plan.parts).value());
    if (plan.score == ScoreKind::kRanges) {
      add_ranges(call, s.k_rows, row.block_m, plan.keys, workspace);
    } else if (lists_tiles(plan.score)) {
      add_step_lists(call, row.block_m, plan.keys, workspace);
    } else {
      add_mask_tiles(call, plan.keys, workspace);
      add_segments(call, s.k_rows, plan.keys, workspace);
    }
    const bool unequal = call.tiles_differ() || lists_tiles(plan.score) || s.k_rows % row.block_n;
    plan.cluster_size = cluster_of(row);
    const DqRounder rounder(row, call, plan);
    plan.dq_rounding = rounder.best();
    if (plan.dq_rounding == DqRounding::kCtas)
      return plan_persistent(plan.keys.blocks, false, 0, row, call, workspace, plan);
    if (plan.dq_rounding == DqRounding::kHeads) {
      plan_persistent(rounder.heads(), rounder.sequences_differ(), 0, row, call, workspace, plan);
      plan.dq_sums = workspace.add(plan.persistent_ctas * rounder.kept_sums_bytes());
      return;
    }
    plan_persistent(plan.keys.blocks * plan.cluster_size, unequal, s.q_rows, row, call, workspace, plan);
    if (call.spec.deterministic) {
      plan.dq_tickets = workspace.add(dq_tickets_bytes(call.spec, dims_of(s), row.block_m).value());
      if (plan.tile_counter < 0) plan.tile_counter = workspace.add(kCounterBytes);
    }
    // The sums come last, so that one memset clears them and what lies between them and the counter.
    plan.dq_sums = workspace.add(dq_sums_bytes(call.spec, dims_of(s), row.block_m).value());
    if (plan.dq_rounding == DqRounding::kClusters) plan.cluster_size = static_cast<int32_t>(plan.keys.tiles);
  }

  Dim workspace_bound(const AttentionSpec& spec, const DimShapes& s) const override {
    const Dim tickets = spec.deterministic ? aligned(dq_tickets_bytes(spec, s, kConsumerRows)) : Dim(0);
    return schedule_bound(spec, s, s.k_rows) +
           max(max(segments_bound(spec, s, s.k_rows), ranges_bound(spec, s, s.k_rows)),
               step_lists_bound(spec, s)) +
           mask_tiles_bound(spec, s) +
           aligned(max(dq_sums_bytes(spec, s, kLargestQueryTile), sums_bound_of_96_queries(spec, s))) +
           part_gradients_bound(spec, s) + tickets + aligned(kCounterBytes);
  }

 private:
  // Whether tiles of 96 queries may serve a call: smaller heads have rows with larger tiles.
  static bool may_take_96_queries(int64_t d, int64_t dv) { return std::max(d, dv) > hopper::kSmallHeadDim; }

  static Dim sums_bound_of_96_queries(const AttentionSpec& spec, const DimShapes& s) {
    const bool known = s.head_dim.known() && s.value_dim.known();
    if (known && !may_take_96_queries(s.head_dim.value(), s.value_dim.value())) return 0;
    if (s.head_dim.known() && s.head_dim.value() > hopper::kHeadDimOf96Queries) return 0;
    return dq_sums_bytes(spec, s, hopper::k96Queries);
  }

  // Tiles of 96 queries take about 14/15 of the time of tiles of 64 for each row, unless too many rows of the
  // last tile are not in use: of packed sequences, on average half of it.
  static bool wants_96_queries(const Call& call) {
    constexpr int64_t kTime = 14, kTimeOfSmall = 15;
    const Shapes& s = call.shapes;
    const auto rows = [&](int64_t tile) {
      const int64_t used = call.rows_of_sequence();
      return call.spec.packed() ? used + tile / 2 : ceil_div(used, tile) * tile;
    };
    return may_take_96_queries(s.head_dim, s.value_dim) &&
           kTime * rows(hopper::k96Queries) <= kTimeOfSmall * rows(kConsumerRows);
  }

  // Whether the steps of a call with blocks come from lists. Lists have no fixed order for the additions to
  // dQ, so deterministic calls do not use them.
  static bool lists_steps(const KernelRow& row, const Call& call) {
    const Shapes& s = call.shapes;
    return !call.spec.deterministic && ListedStep::fit(s.heads, s.kv_heads, s.q_rows, row.block_m);
  }
  // Whether the row's kernel stages tiles of a bias or mask.
  static bool stages_tiles(const KernelRow& row, const Call& call) {
    return call.spec.has(Operand::kBias) || stages_mask(row, call);
  }
  // CTAs that work on one key tile together.
  static int32_t cluster_of(const KernelRow& row) {
    return hopper::backward_in_clusters(row) ? hopper::backward_cluster_ctas(row) : 1;
  }
};

// CTAs own tiles of dbias. Only biases that broadcast over nothing but batch entries and heads are served.
class BiasGradient final : public PassTraits {
 public:
  bool serves(const KernelRow& row, const Call& call) const override {
    const Shapes& s = call.shapes;
    if (stages_mask(row, call) && !s.mask_in_chunks) return false;
    return stages_bias(row, call) && s.bias[2] == s.q_rows && s.bias[3] == s.k_rows && s.q_rows > 0;
  }

  int64_t shared_bytes(const KernelRow&, const Call&) const override { return hopper::kMaxSharedBytes; }

  void plan_grid(const KernelRow& row, const Call& call, Workspace& workspace,
                 LaunchPlan& plan) const override {
    plan_bias_tiles(row, call, workspace, plan);
    if (jax_flash::stages_mask(plan.score)) {
      add_mask_tiles(call, plan.queries, workspace);
    } else {
      add_mask_words(call, plan.queries, workspace);
    }
    add_segments(call, call.shapes.q_rows, plan.queries, workspace);
    plan_persistent(plan.queries.blocks, false, 0, row, call, workspace, plan);
    plan.tile_counter = workspace.add(kCounterBytes);
  }

  Dim workspace_bound(const AttentionSpec& spec, const DimShapes& s) const override {
    return mask_words_bound(spec, s) + segments_bound(spec, s, s.q_rows) + dbias_parts_bound(s) +
           aligned(kCounterBytes);
  }
};

class LatentDecode final : public latent::Decode {
 public:
  int64_t shared_bytes(const KernelRow& row, const Call&) const override {
    return (row.design == Design::kLatentFew ? latent::few_bytes(row) : latent::tile_bytes(row)) +
           latent::kStateBytes;
  }
};

// Latent pools, and short calls in clusters; the portable decode runs all others.
class Decode final : public PassTraits {
 public:
  bool serves(const KernelRow& row, const Call& call) const override {
    return row.is_latent() ? latent_.serves(row, call) : clusters::serves(row, call);
  }
  bool takes_blocks(const KernelRow& row) const override { return row.is_latent(); }
  bool runs_every_sequence(const KernelRow& row) const override { return row.is_latent(); }

  int64_t shared_bytes(const KernelRow& row, const Call& call) const override {
    return row.is_latent() ? latent_.shared_bytes(row, call) : clusters::shared_bytes(row, call);
  }
  bool better(const KernelRow& a, const KernelRow& b, const Call& call) const override {
    return a.is_latent() && latent_.better(a, b, call);
  }
  void plan_grid(const KernelRow& row, const Call& call, Workspace& workspace,
                 LaunchPlan& plan) const override {
    if (row.is_latent()) return latent_.plan_grid(row, call, workspace, plan);
    plan.decode.columns = static_cast<int32_t>(call.shapes.kv_heads);
    const clusters::Choice choice(row, call);
    plan.decode.ranges = choice.size();
    if (call.spec.packed()) {  // the forward's plan has the cluster size of its own
      plan.decode.packed_rows = row.block_m;
    } else {
      plan.cluster_size = choice.size();
    }
    if (!choice.asks_for_lengths()) return;
    plan.decode.ranges *= static_cast<int32_t>(call.entries());  // shares for as many CTAs
    plan_parts(row, call, call.entries(), 0, workspace, plan.decode);
  }
  Dim workspace_bound(const AttentionSpec& spec, const DimShapes& s) const override {
    return latent_.workspace_bound(spec, s);
  }

 private:
  LatentDecode latent_;
};

}  // namespace

namespace families {

const Family& hopper() {
  static const Forward forward;
  static const Backward backward;
  static const BiasGradient bias_gradient;
  static const Decode decode;
  static const Family family{&forward, &backward, &bias_gradient, &decode};
  return family;
}

}  // namespace families
}  // namespace jax_flash
