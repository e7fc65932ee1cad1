// Families that do not exist, for tests/test_families.py: Hopper with a backward and a decode of its own, and
// the forward of an imagined arch, sm199. Their rows are in the table that the test writes; nothing else is
// edited.
#include "core/families/hopper_layout.h"
#include "core/plan/family.h"

namespace jax_flash {

namespace families {
const Family& hopper();
}

namespace {

// Key tiles, with dQ added up in float32; TMA has room for one leading dimension, as in the forward.
class HopperBackward final : public PassTraits {
 public:
  bool serves(const KernelRow&, const Call& call) const override {
    return call.shapes.leading_rank <= 1 && !call.spec.has(Operand::kMask);
  }
  int64_t shared_bytes(const KernelRow& row, const Call&) const override {
    const int64_t tiles = 2 * row.block_m * row.stages + row.block_n;
    return 2 * tiles * (row.head_dim + row.value_dim) / 2 + hopper::kStateBytes;
  }
  void plan_grid(const KernelRow& row, const Call& call, Workspace& workspace,
                 LaunchPlan& plan) const override {
    plan.keys = tile_grid(call, call.shapes.k_rows, call.shapes.kv_heads, row.block_n, workspace);
    plan.persistent_ctas = call.device.sm_count;
    plan.dq_sums = workspace.add(dq_sums_bytes(call.spec, dims_of(call.shapes), row.block_m).value());
  }
  Dim workspace_bound(const AttentionSpec& spec, const DimShapes& s) const override {
    return schedule_bound(spec, s, s.k_rows) + aligned(dq_sums_bytes(spec, s, kLargestQueryTile));
  }
};

// One column per KV head; the bulk copies need whole groups of 16 rows of a page.
class HopperDecode final : public PassTraits {
 public:
  bool serves(const KernelRow& row, const Call& call) const override {
    const int64_t rows = call.rows_of_group();
    return 0 < rows && rows <= row.block_m && call.spec.layout != Layout::kVarlen &&
           call.shapes.page_size % 16 == 0;
  }
  int64_t shared_bytes(const KernelRow& row, const Call&) const override {
    return 2 * row.stages * row.block_n * (row.head_dim + row.value_dim) + hopper::kStateBytes;
  }
  void plan_grid(const KernelRow&, const Call& call, Workspace&, LaunchPlan& plan) const override {
    plan.decode.columns = static_cast<int32_t>(call.shapes.kv_heads);
    plan.decode.ranges = call.device.sm_count;
  }
  Dim workspace_bound(const AttentionSpec&, const DimShapes&) const override { return 0; }
};

class ImaginedForward final : public PassTraits {
 public:
  bool serves(const KernelRow&, const Call& call) const override { return !call.spec.packed(); }
  int64_t shared_bytes(const KernelRow&, const Call&) const override { return 200'000; }
  bool better(const KernelRow& a, const KernelRow& b, const Call&) const override {
    return a.block_m > b.block_m;
  }
  void plan_grid(const KernelRow& row, const Call& call, Workspace& workspace,
                 LaunchPlan& plan) const override {
    plan.queries = tile_grid(call, call.shapes.q_rows, call.shapes.heads, row.block_m, workspace);
    plan.cluster_size = row.multicast;
  }
  Dim workspace_bound(const AttentionSpec&, const DimShapes&) const override { return 0; }
};

}  // namespace

namespace families {

const Family& next_hopper() {
  static const HopperBackward backward;
  static const HopperDecode decode;
  static const Family family{hopper().forward, &backward, nullptr, &decode};
  return family;
}

const Family& imagined() {
  static const ImaginedForward forward;
  static const Family family{&forward};
  return family;
}

}  // namespace families
}  // namespace jax_flash
