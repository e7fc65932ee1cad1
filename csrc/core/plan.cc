#include "plan.h"

#include <limits>

namespace jax_flash {
namespace {

constexpr const char* kDTypeNames[] = {"float16", "bfloat16", "float32"};
constexpr const char* kPassNames[] = {"forward", "backward", "bias_gradient"};

int64_t element_size(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }

// sm80 code runs on every newer card; a later family only on the cards of its own major version.
bool covers(const KernelRow& row, const Device& device) {
  if (row.capability == 80) return device.capability >= 80;
  return device.capability >= row.capability && device.capability / 10 == row.capability / 10;
}

// Q, and `stages` tiles of K and of V.
int64_t shared_memory(const KernelRow& row, DType dtype) {
  const int64_t keys = int64_t{row.stages} * row.block_n * (row.head_dim + row.value_dim);
  return (int64_t{row.block_m} * row.head_dim + keys) * element_size(dtype) + kBlockStateBytes;
}

bool runs(const KernelRow& row, Pass pass, const Shapes& shapes, const Device& device) {
  return row.pass == pass && row.takes(shapes.dtype) && row.head_dim >= shapes.head_dim &&
         row.value_dim >= shapes.value_dim && covers(row, device) &&
         shared_memory(row, shapes.dtype) <= device.shared_memory;
}

// The newest family, then the least padding; the table's order decides among equals.
bool better(const KernelRow& a, const KernelRow& b) {
  if (a.capability != b.capability) return a.capability > b.capability;
  return a.head_dim + a.value_dim < b.head_dim + b.value_dim;
}

bool is_general(const AttentionSpec& spec) {
  for (Operand operand :
       {Operand::kQSegmentIds, Operand::kMask, Operand::kBias, Operand::kAlibiSlopes, Operand::kDropout}) {
    if (spec.has(operand)) return true;
  }
  // The plain kernel takes the row maximum before it scales, which wants a positive scale.
  return spec.softcap > 0 || !(spec.scale > 0);
}

std::string no_kernel(Pass pass, const Shapes& shapes, const Device& device,
                      std::span<const KernelRow> built) {
  std::string rows;
  for (const KernelRow& row : built) {
    rows += std::string(rows.empty() ? "" : ", ") + row.family + " " +
            kPassNames[static_cast<int>(row.pass)] + " d=" + std::to_string(row.head_dim) +
            " dv=" + std::to_string(row.value_dim);
    for (int i = 0; i < 3; ++i) {
      if (row.takes(static_cast<DType>(i))) rows += std::string(" ") + kDTypeNames[i];
    }
  }
  return std::string("jax_flash: no CUDA kernel was built for the ") + kPassNames[static_cast<int>(pass)] +
         " of " + kDTypeNames[static_cast<int>(shapes.dtype)] + " with d=" + std::to_string(shapes.head_dim) +
         ", dv=" + std::to_string(shapes.value_dim) + " on sm_" + std::to_string(device.capability) +
         " with " + std::to_string(device.shared_memory) +
         " bytes of shared memory (built: " + (rows.empty() ? "none" : rows) +
         "); implementation=\"xla\" runs it";
}

}  // namespace

int64_t varlen_tiles(int64_t q_rows, int64_t sequences, int64_t block_m) {
  return q_rows / block_m + sequences + 2;
}

int64_t workspace_bound(const AttentionSpec& spec, const Shapes& shapes) {
  if (spec.layout == Layout::kFixed) return 0;
  // The schedule, then the starts: q [n + 3] with the tokens before and after, and k [n + 1], int32.
  const int64_t schedule =
      varlen_tiles(shapes.q_rows, shapes.batch, kSmallestBlockM) * int64_t{sizeof(TileWork)};
  return shapes.leading * (schedule + 8 * (shapes.batch + 2));
}

LaunchPlan plan(Pass pass, const AttentionSpec& spec, const Shapes& shapes, const Device& device,
                std::span<const KernelRow> built) {
  LaunchPlan result;
  if (shapes.head_dim % 8 || shapes.value_dim % 8) {
    result.error = "jax_flash: head dims " + std::to_string(shapes.head_dim) + " and " +
                   std::to_string(shapes.value_dim) + " on CUDA, which takes multiples of 8; pad them";
    return result;
  }
  const KernelRow* row = nullptr;
  for (const KernelRow& candidate : built) {
    if (runs(candidate, pass, shapes, device) && (!row || better(candidate, *row))) row = &candidate;
  }
  if (!row) {
    result.error = no_kernel(pass, shapes, device, built);
    return result;
  }
  const bool varlen = spec.layout == Layout::kVarlen;
  result.general = is_general(spec);
  result.tiles = varlen ? varlen_tiles(shapes.q_rows, shapes.batch, row->block_m)
                        : ceil_div(shapes.q_rows, row->block_m);
  const bool empty = shapes.q_rows == 0 || shapes.value_dim == 0;
  result.blocks = empty ? 0 : result.tiles * shapes.heads * shapes.leading * (varlen ? 1 : shapes.batch);
  result.shared = shared_memory(*row, shapes.dtype);
  if (varlen) {
    result.workspace = shapes.leading * (result.tiles * int64_t{sizeof(TileWork)} + 8 * (shapes.batch + 2));
  }
  if (result.blocks > std::numeric_limits<int32_t>::max()) {
    result.error = "jax_flash: " + std::to_string(result.blocks) +
                   " query tiles in one call, more than 2**31 - 1; split the batch";
    return result;
  }
  result.kernel = static_cast<int32_t>(row - built.data());
  return result;
}

std::string LaunchPlan::to_string(const KernelRow& row) const {
  return std::string(row.family) + " " + kPassNames[static_cast<int>(row.pass)] +
         (general ? " general" : " plain") + " d=" + std::to_string(row.head_dim) +
         " dv=" + std::to_string(row.value_dim) + " tile " + std::to_string(row.block_m) + "x" +
         std::to_string(row.block_n) + ", " + std::to_string(blocks) + " blocks, " + std::to_string(shared) +
         " bytes shared, " + std::to_string(workspace) + " bytes workspace";
}

Shapes shapes_of(const Problem& p) {
  return {p.dtype, p.leading.count(), p.batch, p.heads, p.head_dim, p.value_dim, p.q_rows};
}

}  // namespace jax_flash
