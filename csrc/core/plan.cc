#include "plan.h"

#include <algorithm>
#include <limits>

#include "split.h"

namespace jax_flash {
namespace {

constexpr const char* kDTypeNames[] = {"float16", "bfloat16", "float32"};
constexpr const char* kScoreNames[] = {"plain",    "general", "general", "dropout",
                                       "segments", "alibi",   "softcap", "bias"};
constexpr const char* kPassNames[] = {"forward", "backward", "bias_gradient", "paged_forward", "decode"};

int64_t element_size(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }

// sm75 and sm80 code runs on every newer card; a later family only on the cards of its own major version.
bool covers(const KernelRow& row, const Device& device) {
  if (row.capability <= 80) return device.capability >= row.capability;
  return device.capability >= row.capability && device.capability / 10 == row.capability / 10;
}

// Elements of the tiles in shared memory. Without a stage two tiles have one place.
int64_t shared_elements(const KernelRow& row) {
  const int64_t both = row.head_dim + row.value_dim, larger = std::max(row.head_dim, row.value_dim);
  const int64_t m = row.block_m, n = row.block_n, staged = row.stages == 0 ? larger : row.stages * both;
  switch (row.pass) {
    case Pass::kForward:
    case Pass::kPagedForward:  // Q, and `stages` tiles of K and of V
      return m * row.head_dim + n * staged;
    case Pass::kDecode:  // `stages` tiles of K and of V
      return n * staged;
    case Pass::kBackward:  // K and V, `stages` tiles of Q and of dO, P and dS
      return n * both + m * staged + 2 * m * n;
    case Pass::kBiasGradient:  // Q and K, dO and V
      return (m + n) * staged;
  }
  return 0;
}

int64_t shared_memory(const KernelRow& row, DType dtype) {
  int64_t others = kBlockStateBytes;
  if (row.capability == 90) others = kHopperStateBytes;
  if (row.pass == Pass::kBackward)
    others += std::max(row.stages, 1) * int64_t{row.block_m} * 8;  // lse and delta of rows
  if (row.pass == Pass::kPagedForward && row.capability != 90)
    others += (row.stages + int64_t{1}) * row.block_n * 16;  // where keys lie
  if (row.pass == Pass::kDecode) {  // O, a few columns at a time, and the softmax of each warp
    const int64_t columns = row.block_m == 8 && row.value_dim % 64 == 0 ? 64 : 32;
    others += int64_t{row.warps} * row.block_m * (4 * (columns + 4) + 8);
  }
  return shared_elements(row) * element_size(dtype) + others;
}

// Softcaps whose powers of e are float32's.
constexpr float kLargestSoftcap = 50;

// What a call does to scores; kGeneral: more than one thing, or something that has no kernel of its own.
ScoreKind only_option(const AttentionSpec& spec, const Shapes& shapes) {
  struct {
    bool wanted, served;
    ScoreKind kind;
  } const options[] = {
      {spec.has(Operand::kQSegmentIds), true, ScoreKind::kSegments},
      {spec.has(Operand::kAlibiSlopes), true, ScoreKind::kAlibi},
      {spec.has(Operand::kBias), shapes.bias_in_tiles, ScoreKind::kBias},
      {spec.has(Operand::kDropout), true, ScoreKind::kDropoutAlone},
      {spec.softcap > 0, spec.softcap <= kLargestSoftcap, ScoreKind::kSoftcap},
      // The plain kernel takes the row maximum before it scales, which wants a positive scale.
      {spec.has(Operand::kMask) || !(spec.scale > 0), false, ScoreKind::kGeneral},
  };
  ScoreKind found = ScoreKind::kPlain;
  for (const auto& option : options) {
    if (!option.wanted) continue;
    found = found == ScoreKind::kPlain && option.served ? option.kind : ScoreKind::kGeneral;
  }
  return found;
}

// The kernel of a row that a call takes.
ScoreKind score_kind(const KernelRow& row, const AttentionSpec& spec, const Shapes& shapes) {
  const ScoreKind only = only_option(spec, shapes);
  if (only == ScoreKind::kPlain || (only == ScoreKind::kDropoutAlone && row.pass == Pass::kForward))
    return only;
  if (row.capability == 90 && row.pass == Pass::kForward && only != ScoreKind::kGeneral) return only;
  return spec.has(Operand::kDropout) && row.pass == Pass::kForward ? ScoreKind::kDropout
                                                                   : ScoreKind::kGeneral;
}

// The sm90 family: the copy engine's tensor maps have room for one leading dimension, and its boxes are of
// whole groups of 8 rows of a page, which it cannot widen.
bool serves(const KernelRow& row, const AttentionSpec& spec, const Shapes& shapes) {
  if (row.capability != 90) return true;
  return shapes.leading_rank <= 1 && shapes.page_size % 8 == 0 && shapes.kv_dtype == shapes.dtype &&
         hopper_holds(score_kind(row, spec, shapes), row.head_dim, row.block_n, row.block_m / kHopperRows);
}

// Of float8 a decode kernel copies and multiplies 64 features at a time.
bool takes_pool(const KernelRow& row, Pass pass, const Shapes& shapes) {
  return pass != Pass::kDecode || shapes.kv_dtype == shapes.dtype ||
         (row.head_dim % 64 == 0 && row.value_dim % 64 == 0);
}

bool runs(const KernelRow& row, Pass pass, const AttentionSpec& spec, const Shapes& shapes,
          const Device& device) {
  return serves(row, spec, shapes) && row.pass == pass && row.takes(shapes.dtype) &&
         row.head_dim >= shapes.head_dim && row.value_dim >= shapes.value_dim && covers(row, device) &&
         takes_pool(row, pass, shapes) && shared_memory(row, shapes.dtype) <= device.shared_memory;
}

// Keys that a row of queries sees, at most and on average over packed sequences.
int64_t keys_in_sight(const AttentionSpec& spec, const Shapes& s) {
  const int64_t keys = spec.packed() ? s.k_rows / std::max<int64_t>(1, s.batch) : s.k_rows;
  return spec.left < 0 || spec.right < 0 ? keys : std::min(keys, int64_t{spec.left} + 1 + spec.right);
}

// Whether all tiles of kHopperRows queries find a multiprocessor at once: larger ones would leave some idle.
bool few_queries(const AttentionSpec& spec, const Shapes& s, const Device& device) {
  const int64_t sequences = spec.packed() ? 1 : s.batch;
  return ceil_div(s.q_rows, kHopperRows) * s.heads * sequences * s.leading <= device.sm_count;
}

// The newest family, then the least padding, then of sm90's tiles those of few queries where these are few,
// and those of more keys where these are many; the table's order decides among equals.
bool better(const KernelRow& a, const KernelRow& b, int64_t keys, bool few) {
  constexpr int64_t kMany = 1536;
  if (a.capability != b.capability) return a.capability > b.capability;
  if (a.head_dim + a.value_dim != b.head_dim + b.value_dim) {
    return a.head_dim + a.value_dim < b.head_dim + b.value_dim;
  }
  if (a.pass == Pass::kForward && a.capability == 90) {
    const bool small = a.block_m == kHopperRows;
    if (small != (b.block_m == kHopperRows)) return small == few;
    return (a.block_n > b.block_n) == (keys >= kMany) && a.block_n != b.block_n;
  }
  return a.pass == Pass::kDecode && a.block_m > b.block_m;
}

// Query rows that read one KV head: of a sequence, or of a token where sequences are packed.
int64_t rows_of_group(const AttentionSpec& spec, const Shapes& s) {
  return s.kv_heads == 0 ? 0 : s.heads / s.kv_heads * (spec.packed() ? 1 : s.q_rows);
}

// Whether the keys' bytes, not the products, bound a call, and decode has all that it needs.
bool decodes(const AttentionSpec& spec, const Shapes& s) {
  for (Operand operand : {Operand::kQSegmentIds, Operand::kMask, Operand::kBias, Operand::kDropout}) {
    if (spec.has(operand)) return false;
  }
  if (spec.layout == Layout::kVarlen) return false;
  // Rows of float8 are copied 16 bytes at a time.
  if (s.kv_dtype != s.dtype && (s.dtype == DType::kF32 || s.head_dim % 16 || s.value_dim % 16)) return false;
  const int64_t rows = rows_of_group(spec, s), entries = s.leading * s.batch;
  return 0 < s.q_rows && 0 < rows && rows <= (spec.paged() ? kDecodeRows : kDecodeChunk) && 0 < entries &&
         entries <= std::numeric_limits<int32_t>::max();
}

// Rows of one chunk where a smaller one would do are wasted.
bool fits_rows(const KernelRow& row, const AttentionSpec& spec, const Shapes& s) {
  return row.block_m == 8 || rows_of_group(spec, s) > 8;
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

// Blocks that stay: as many as fit. A counter shares out tiles of unequal length.
void share_tiles(const AttentionSpec& spec, const Shapes& s, const Device& device, const KernelRow& row,
                 Workspace& workspace, LaunchPlan& result) {
  const TileGrid& grid = result.queries;
  result.pairs = in_pairs(spec, s, device, row, result);
  const int64_t cluster = result.pairs ? 2 : 1,
                most = int64_t{device.sm_count} * row.blocks / cluster * cluster;
  const int64_t blocks =
      grid.blocks == 0 ? 0 : grid.blocks / grid.tiles * ceil_div(grid.tiles, cluster) * cluster;
  result.workers = static_cast<int32_t>(std::min(blocks, most));
  bool unequal = spec.packed() || spec.paged() || spec.left >= 0 || spec.right >= 0 || s.q_rows % row.block_m;
  for (Operand operand : {Operand::kQLengths, Operand::kKvLengths, Operand::kQSegmentIds})
    unequal |= spec.has(operand);
  if (unequal && blocks > most) result.counter = workspace.add(kCounterBytes);
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
  const int64_t keys = keys_in_sight(spec, shapes);
  const bool few = few_queries(spec, shapes, device);
  const auto choose = [&](Pass wanted) {
    const KernelRow* row = nullptr;
    for (const KernelRow& candidate : built) {
      if (wanted == Pass::kDecode && !fits_rows(candidate, spec, shapes)) continue;
      if (runs(candidate, wanted, spec, shapes, device) && (!row || better(candidate, *row, keys, few)))
        row = &candidate;
    }
    return row;
  };
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
  if (pass == Pass::kForward && decodes(spec, shapes)) decode = choose(Pass::kDecode);
  if (spec.paged()) pass = Pass::kPagedForward;
  const KernelRow* row = decode && !spec.packed() ? decode : choose(pass);
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

std::string KernelRow::to_string() const {
  std::string text = std::string(family) + " " + kPassNames[static_cast<int>(pass)];
  for (DType dtype : {DType::kF16, DType::kBF16, DType::kF32}) {
    if (takes(dtype)) text += std::string(" ") + kDTypeNames[static_cast<int>(dtype)];
  }
  return text + " d=" + std::to_string(head_dim) + " dv=" + std::to_string(value_dim) + " tile " +
         std::to_string(block_m) + "x" + std::to_string(block_n) + " stages " + std::to_string(stages) +
         " warps " + std::to_string(warps);
}

std::string LaunchPlan::to_string(const KernelRow& row) const {
  std::string text = std::string(row.family) + " " + kPassNames[static_cast<int>(row.pass)] + " " +
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
