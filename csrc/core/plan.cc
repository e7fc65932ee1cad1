#include "plan.h"

#include <algorithm>
#include <limits>

#include "choice.h"
#include "split.h"

namespace jax_flash {
namespace {

constexpr const char* kScoreNames[] = {"plain",    "general", "general", "dropout",
                                       "segments", "alibi",   "softcap", "bias"};

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

// Blocks of a column: one wave of them, or a few where one leaves multiprocessors idle.
int32_t decode_ranges(int64_t columns, int64_t wave) {
  const auto efficiency = [&](int64_t ranges) {
    const int64_t blocks = columns * ranges;
    return static_cast<double>(blocks) / static_cast<double>(ceil_div(blocks, wave) * wave);
  };
  constexpr double kGain = 1.05;  // that is worth more blocks
  int64_t best = std::max<int64_t>(1, wave / columns);
  for (int64_t ranges = best + 1; ranges * columns <= kDecodeBlocks && ranges <= 4 * wave / columns;
       ++ranges) {
    if (efficiency(ranges) > efficiency(best) * kGain) best = ranges;
  }
  return static_cast<int32_t>(best);
}

// O and softmax of the rows of all parts, and no more Targets than there are of them.
int64_t part_bytes(int64_t rows, int64_t value_dim) {
  return rows * (4 * value_dim + 8 + kDecodeTargetBytes);
}

DecodeGrid make_decode_grid(const AttentionSpec& spec, const Shapes& s, const Device& device,
                            const KernelRow& row, Workspace& workspace) {
  DecodeGrid grid;
  const int64_t entries = s.leading * s.batch, tiles = ceil_div(std::max<int64_t>(s.k_rows, 1), row.block_n);
  const int64_t chunks = ceil_div(rows_of_group(spec, s), row.block_m);
  grid.columns = static_cast<int32_t>(s.kv_heads * chunks);
  if (spec.packed()) grid.packed_rows = static_cast<int32_t>(chunks * row.block_m);
  const int64_t wave = std::min<int64_t>(int64_t{device.sm_count} * row.blocks, kDecodeBlocks);
  grid.ranges = static_cast<int32_t>(std::min<int64_t>(decode_ranges(grid.columns, wave), entries * tiles));
  if (spec.num_splits > 0) {
    grid.parts = std::min(spec.num_splits, kMaxSplits);
    grid.slots = static_cast<int32_t>(std::min<int64_t>(grid.parts, tiles));
  } else if (spec.batch_invariant) {
    grid.part_tiles = static_cast<int32_t>(kDecodePart / row.block_n);
    grid.slots = static_cast<int32_t>(ceil_div(tiles, grid.part_tiles));
  }
  grid.all_slots = grid.fixed_parts() ? entries * grid.slots : 2 * int64_t{grid.ranges};
  const bool cuts = grid.fixed_parts() ? grid.slots > 1 : grid.ranges > 1;
  if (cuts) grid.memory = workspace.add(part_bytes(grid.all_slots * grid.columns * row.block_m, s.value_dim));
  return grid;
}

// Enough for the parts of make_decode_grid.
int64_t decode_bound(const AttentionSpec& spec, const Shapes& s) {
  const int64_t rows = rows_of_group(spec, s), entries = s.leading * s.batch;
  if (spec.layout == Layout::kVarlen || rows > kDecodeRows) return 0;
  const int64_t column_rows = s.kv_heads * (rows + kDecodeChunk - 1);
  if (spec.num_splits > 0) {
    return part_bytes(entries * column_rows * std::min(spec.num_splits, kMaxSplits), s.value_dim);
  }
  if (spec.batch_invariant) {
    return part_bytes(entries * column_rows * (s.k_rows / kDecodePart + 1), s.value_dim);
  }
  const int64_t most = entries * (s.k_rows / kDecodeTile + 1) * column_rows;
  return part_bytes(2 * std::min(kDecodeBlocks * kDecodeChunk, most), s.value_dim);
}

// Pairs of blocks copy half as much, which pays where a head has many keys (K of 2 MB), and have a tile too
// many where their number is odd.
bool in_pairs(const AttentionSpec& spec, const Shapes& s, const Device& device, const KernelRow& row,
              const LaunchPlan& plan) {
  if (row.pass != Pass::kForward || row.capability != 90 || plan.score != ScoreKind::kPlain ||
      spec.packed() || !hopper_pairs(row.head_dim, row.block_n))
    return false;
  constexpr int64_t kElements = 1 << 20, kTiles = 16;
  const bool many = keys_in_sight(spec, s) * row.head_dim >= kElements;
  return device.always_pairs || (many && (plan.queries.tiles % 2 == 0 || plan.queries.tiles > kTiles));
}

// Blocks that stay: as many as fit, of one team or more. A counter shares out tiles of unequal length.
void share_tiles(const AttentionSpec& spec, const Shapes& s, const Device& device, const KernelRow& row,
                 Workspace& workspace, LaunchPlan& result) {
  const TileGrid& grid = result.queries;
  result.pairs = in_pairs(spec, s, device, row, result);
  const int64_t cluster = result.pairs ? 2 : 1, most = int64_t{device.sm_count} / cluster * cluster;
  const int64_t blocks =
      grid.blocks == 0 ? 0 : grid.blocks / grid.tiles * ceil_div(grid.tiles, cluster) * cluster;
  result.workers = static_cast<int32_t>(std::min(blocks, most));
  const bool unequal = rows_differ(spec) || s.q_rows % row.block_m;
  if (unequal && blocks > most * row.teams()) result.counter = workspace.add(kCounterBytes);
}

// decode: the row that takes the call, or its sequences of few rows where they are packed; null: none.
void plan_grids(Pass pass, const AttentionSpec& spec, const Shapes& s, const Device& device,
                const KernelRow& row, const KernelRow* decode, LaunchPlan& result) {
  Workspace workspace;
  if (decode) result.decode = make_decode_grid(spec, s, device, *decode, workspace);
  if (pass == Pass::kForward || pass == Pass::kPagedForward) {
    result.queries = make_grid(spec, s, s.q_rows, s.heads, row.block_m, workspace);
    if (row.capability == 90) share_tiles(spec, s, device, row, workspace, result);
  } else if (pass == Pass::kBackward) {
    result.keys = make_grid(spec, s, s.k_rows, s.kv_heads, row.block_n, workspace);
    if (spec.deterministic) {
      result.queries = make_grid(spec, s, s.q_rows, s.heads, row.block_m, workspace);
    } else {
      result.accumulator = workspace.add(accumulator_bytes(s, spec.packed()));
    }
  } else if (pass == Pass::kBiasGradient) {
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
  if (pass == Pass::kForward) workspace.add(decode_bound(spec, shapes));
  if (pass == Pass::kForward) workspace.add(kCounterBytes);
  return workspace.bytes;
}

LaunchPlan plan(Pass pass, const AttentionSpec& spec, const Shapes& shapes, const Device& device,
                std::span<const KernelRow> built) {
  LaunchPlan result;
  const auto best = [&](Pass wanted) { return choose(wanted, spec, shapes, device, built); };
  if (shapes.head_dim % 8 || shapes.value_dim % 8) {
    result.error = "jax_flash: head dims " + std::to_string(shapes.head_dim) + " and " +
                   std::to_string(shapes.value_dim) + " on CUDA, which takes multiples of 8; pad them";
    return result;
  }
  if (shapes.dtype == DType::kBF16 && device.capability < 80) {
    result.error =
        "jax_flash: query is bfloat16, which sm_" + std::to_string(device.capability) +
        " has no products of, only of float16 and float32; cast, or implementation=\"xla\" runs it";
    return result;
  }
  const KernelRow* decode = nullptr;
  if (pass == Pass::kForward && decodes(spec, shapes)) decode = best(Pass::kDecode);
  if (spec.paged()) pass = Pass::kPagedForward;
  const KernelRow* row = decode && !spec.packed() ? decode : best(pass);
  if (!row) {
    result.error = no_kernel(pass, shapes, device, built);
    return result;
  }
  result.score = score_kind(*row, spec, shapes);
  result.shared = shared_memory(*row, shapes.dtype);
  plan_grids(row->pass, spec, shapes, device, *row, decode, result);
  if (decode && decode != row) result.decode_kernel = static_cast<int32_t>(decode - built.data());
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
  std::string text = std::string(row.family) + " " + name_of(row.pass) + " " +
                     kScoreNames[static_cast<int>(score)] + " d=" + std::to_string(row.head_dim) +
                     " dv=" + std::to_string(row.value_dim) + " tile " + std::to_string(row.block_m) + "x" +
                     std::to_string(row.block_n);
  if (decode.columns) {
    text +=
        ", " + std::to_string(decode.columns) + " columns of " + std::to_string(decode.ranges) + " blocks";
  }
  if (queries.blocks)
    text += ", " + std::to_string(queries.blocks) + (workers ? " tiles of queries" : " blocks of queries");
  if (workers) text += " for " + std::to_string(workers) + (pairs ? " blocks in pairs" : " blocks");
  if (row.teams() > 1) text += " of " + std::to_string(row.teams()) + " teams";
  if (keys.blocks) text += ", " + std::to_string(keys.blocks) + " blocks of keys";
  return text + ", " + std::to_string(shared) + " bytes shared, " + std::to_string(workspace) +
         " bytes workspace";
}

namespace {

// The copy engine's boxes: of 16-bit elements side by side, from rows that begin at multiples of 16 bytes.
bool bias_in_tiles(const Problem& p) {
  const View& bias = p.bias;
  const auto whole = [](int64_t stride) { return stride % 8 == 0; };
  return bias && p.bias_dtype == p.dtype && p.dtype != DType::kF32 && bias.column == 1 &&
         p.leading.rank <= 1 && (bias.row != 0 || p.q_rows == 1) && whole(bias.row) && whole(bias.head) &&
         whole(bias.batch) && whole(bias.leading[0]) && reinterpret_cast<uintptr_t>(bias.data) % 16 == 0;
}

}  // namespace

Shapes shapes_of(const Problem& p) {
  return {p.dtype,
          p.kv_dtype,
          p.leading.count(),
          p.leading.rank,
          p.batch,
          p.heads,
          p.kv_heads,
          p.head_dim,
          p.value_dim,
          p.q_rows,
          p.k_rows,
          p.page_size,
          {p.dbias_batch, p.dbias_heads, p.dbias_rows, p.dbias_columns},
          bias_in_tiles(p)};
}

}  // namespace jax_flash
