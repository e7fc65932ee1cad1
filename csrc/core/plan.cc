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

// Elements of the tiles in shared memory.
int64_t shared_elements(const KernelRow& row) {
  const int64_t width = row.head_dim + row.value_dim, m = row.block_m, n = row.block_n;
  switch (row.pass) {
    case Pass::kForward:  // Q, and `stages` tiles of K and of V
      return m * row.head_dim + row.stages * n * width;
    case Pass::kBackward:  // K and V, `stages` tiles of Q and of dO, P and dS
      return n * width + row.stages * m * width + 2 * m * n;
    case Pass::kBiasGradient:  // Q, dO, K and V
      return (m + n) * width;
  }
  return 0;
}

int64_t shared_memory(const KernelRow& row, DType dtype) {
  // lse and delta of the backward's query rows
  const int64_t statistics = row.pass == Pass::kBackward ? int64_t{row.stages} * row.block_m * 8 : 0;
  return shared_elements(row) * element_size(dtype) + statistics + kBlockStateBytes;
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

// Names the rows of this pass and dtype that were built, each with its head dims once.
std::string no_kernel(Pass pass, const Shapes& shapes, const Device& device,
                      std::span<const KernelRow> built) {
  std::string rows, last;
  for (const KernelRow& row : built) {
    if (row.pass != pass || !row.takes(shapes.dtype)) continue;
    std::string name = std::string(row.family) + " d=" + std::to_string(row.head_dim);
    if (row.value_dim != row.head_dim) name += " dv=" + std::to_string(row.value_dim);
    if (name == last) continue;
    rows += (rows.empty() ? "" : ", ") + name;
    last = name;
  }
  return std::string("jax_flash: no CUDA kernel was built for the ") + kPassNames[static_cast<int>(pass)] +
         " of " + kDTypeNames[static_cast<int>(shapes.dtype)] + " with d=" + std::to_string(shapes.head_dim) +
         ", dv=" + std::to_string(shapes.value_dim) + " on sm_" + std::to_string(device.capability) +
         " with " + std::to_string(device.shared_memory) +
         " bytes of shared memory (built: " + (rows.empty() ? "none" : rows) +
         "); implementation=\"xla\" runs it";
}

// The parts of a workspace, one after the other.
struct Workspace {
  int64_t bytes = 0;

  int64_t add(int64_t part) {
    const int64_t begin = bytes;
    bytes += ceil_div(part, kAlignment) * kAlignment;
    return begin;
  }
};

// A schedule, then the starts: of the rows in question [n + 3] with the tokens before and after, and of the
// others [n + 1], int32.
int64_t schedule_bytes(const Shapes& shapes, int64_t tiles) {
  return shapes.leading * (tiles * int64_t{sizeof(TileWork)} + 8 * (shapes.batch + 2));
}

int64_t accumulator_bytes(const Shapes& s, bool packed) {
  return 4 * s.leading * (packed ? 1 : s.batch) * s.q_rows * s.heads *
         accumulator_columns(static_cast<int32_t>(s.head_dim));
}

TileGrid make_grid(const AttentionSpec& spec, const Shapes& shapes, int64_t rows, int64_t heads,
                   int32_t block, Workspace& workspace) {
  TileGrid grid;
  grid.block = block;
  if (rows == 0 || heads == 0) return grid;
  if (spec.packed()) {
    grid.tiles = varlen_tiles(rows, shapes.batch, block);
    grid.blocks = grid.tiles * heads * shapes.leading;
    grid.schedule = workspace.add(schedule_bytes(shapes, grid.tiles));
  } else {
    grid.tiles = ceil_div(rows, block);
    grid.blocks = grid.tiles * heads * shapes.leading * shapes.batch;
  }
  return grid;
}

void plan_grids(Pass pass, const AttentionSpec& spec, const Shapes& s, const KernelRow& row,
                LaunchPlan& result) {
  Workspace workspace;
  if (pass == Pass::kForward) {
    result.queries = make_grid(spec, s, s.q_rows, s.heads, row.block_m, workspace);
  } else if (pass == Pass::kBackward) {
    result.keys = make_grid(spec, s, s.k_rows, s.kv_heads, row.block_n, workspace);
    if (spec.deterministic) {
      result.queries = make_grid(spec, s, s.q_rows, s.heads, row.block_m, workspace);
    } else {
      result.accumulator = workspace.add(accumulator_bytes(s, spec.packed()));
    }
  } else {
    result.queries.block = row.block_m, result.queries.tiles = ceil_div(s.bias[2], row.block_m);
    result.keys.block = row.block_n, result.keys.tiles = ceil_div(s.bias[3], row.block_n);
    result.queries.blocks = s.leading * s.bias[0] * s.bias[1] * result.queries.tiles * result.keys.tiles;
  }
  result.workspace = workspace.bytes;
}

}  // namespace

int64_t varlen_tiles(int64_t rows, int64_t sequences, int64_t block) { return rows / block + sequences + 2; }

int64_t workspace_bound(Pass pass, const AttentionSpec& spec, const Shapes& shapes) {
  const bool packed = spec.packed(), backward = pass == Pass::kBackward;
  Workspace workspace;
  auto schedule = [&](int64_t rows) {
    workspace.add(schedule_bytes(shapes, varlen_tiles(rows, shapes.batch, kSmallestBlock)));
  };
  if (packed && backward) schedule(shapes.k_rows);
  if (packed && (!backward || spec.deterministic)) schedule(shapes.q_rows);
  if (backward && !spec.deterministic) workspace.add(accumulator_bytes(shapes, packed));
  return workspace.bytes;
}

LaunchPlan plan(Pass pass, const AttentionSpec& spec, const Shapes& shapes, const Device& device,
                std::span<const KernelRow> built) {
  LaunchPlan result;
  if (spec.paged()) {
    result.error = "jax_flash: paged attention has no CUDA kernel yet; implementation=\"xla\" runs it";
    return result;
  }
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
  result.general = is_general(spec);
  result.shared = shared_memory(*row, shapes.dtype);
  plan_grids(pass, spec, shapes, *row, result);
  for (const TileGrid& grid : {result.queries, result.keys}) {
    if (grid.blocks > std::numeric_limits<int32_t>::max()) {
      result.error = "jax_flash: " + std::to_string(grid.blocks) +
                     " tiles in one call, more than 2**31 - 1; split the batch";
      return result;
    }
  }
  result.kernel = static_cast<int32_t>(row - built.data());
  return result;
}

std::string LaunchPlan::to_string(const KernelRow& row) const {
  std::string text = std::string(row.family) + " " + kPassNames[static_cast<int>(row.pass)] +
                     (general ? " general" : " plain") + " d=" + std::to_string(row.head_dim) +
                     " dv=" + std::to_string(row.value_dim) + " tile " + std::to_string(row.block_m) + "x" +
                     std::to_string(row.block_n);
  if (queries.blocks) text += ", " + std::to_string(queries.blocks) + " blocks of queries";
  if (keys.blocks) text += ", " + std::to_string(keys.blocks) + " blocks of keys";
  return text + ", " + std::to_string(shared) + " bytes shared, " + std::to_string(workspace) +
         " bytes workspace";
}

Shapes shapes_of(const Problem& p) {
  return {p.dtype,     p.leading.count(),
          p.batch,     p.heads,
          p.kv_heads,  p.head_dim,
          p.value_dim, p.q_rows,
          p.k_rows,    {p.dbias_batch, p.dbias_heads, p.dbias_rows, p.dbias_columns}};
}

}  // namespace jax_flash
