#include "core/plan/plan.h"

#include <limits>

#include "core/plan/choose.h"
#include "core/table.h"

namespace jax_flash {
namespace {

// The reason why no row can run the call; empty if some row may.
std::string refusal(const Call& call) {
  const Shapes& s = call.shapes;
  if (s.head_dim % 8 || s.value_dim % 8) {
    return "jax_flash: head dims " + std::to_string(s.head_dim) + " and " + std::to_string(s.value_dim) +
           " on CUDA, which takes multiples of 8; pad them";
  }
  if (call.spec.shared_kv() && (s.pool_columns % 8 || call.spec.value_start % 8)) {
    return "jax_flash: keys and values share a pool of " + std::to_string(s.pool_columns) +
           " columns, values from column " + std::to_string(call.spec.value_start) +
           " on; CUDA takes multiples of 8";
  }
  if (s.dtype == DType::kBF16 && call.device.capability < 80) {
    return "jax_flash: query is bfloat16, which sm_" + std::to_string(call.device.capability) +
           " has no products of, only of float16 and float32; cast, or implementation=\"xla\" runs it";
  }
  const bool has_values = call.pass == Pass::kForward || call.pass == Pass::kDecode;
  if (call.spec.shared_kv() && !has_values) {
    return "jax_flash: no CUDA kernel of a derivative takes V for columns of K; pass value again";
  }
  return {};
}

// Whether cp.async can copy 8 keys of a bias or a mask at once: keys are contiguous, and rows begin at
// multiples of 8 keys.
bool in_chunks(const View& view, const Leading& leading, int64_t element_bytes) {
  constexpr int64_t kChunk = 8;
  bool whole = view && view.column == 1 && view.row % kChunk == 0 && view.head % kChunk == 0 &&
               view.batch % kChunk == 0 &&
               reinterpret_cast<uintptr_t>(view.data) % (kChunk * element_bytes) == 0;
  for (int i = 0; i < leading.rank; ++i) whole = whole && view.leading[i] % kChunk == 0;
  return whole;
}

bool has_float_bias(const Problem& p) {
  return p.bias && p.bias_dtype == DType::kF32 && p.dtype != DType::kF32;
}

bool bias_in_chunks(const Problem& p) {
  const bool wide = has_float_bias(p);
  return p.dtype != DType::kF32 && (wide || p.bias_dtype == p.dtype) &&
         in_chunks(p.bias, p.leading, wide ? 4 : 2);
}

// TMA has room for one leading dimension.
bool bias_in_tiles(const Problem& p) { return bias_in_chunks(p) && p.leading.rank <= 1; }

MaskSizes<int64_t> mask_sizes(const Problem& p) {
  if (!p.mask) return {};
  const bool leading = p.mask.leads(p.leading);
  return {(leading ? p.leading.count() : 1) * (p.mask.batch ? p.batch : 1) * (p.mask.head ? p.heads : 1),
          p.mask.row ? p.q_rows : 1, p.mask.column ? p.k_rows : 1};
}

// The largest bound of all families that have rows of the pass.
Dim bound_of(Pass pass, const AttentionSpec& spec, const DimShapes& shapes) {
  Dim bound = 0;
  const Family* last = nullptr;
  for (const KernelRow& row : kernel_table()) {
    const Family& family = row.arch->family();
    if (row.pass != pass || &family == last) continue;  // the table groups its rows by family
    last = &family;
    if (const PassTraits* traits = family.of(pass)) bound = max(bound, traits->workspace_bound(spec, shapes));
  }
  return bound;
}

}  // namespace

// Calls with few query rows run the decode kernels. In packed batches decode runs the short sequences first,
// then the forward runs the others. If the forward is faster for those of average length, decode runs those
// of one token.
PlannedCall plan(const Call& call, std::span<const KernelRow> built) {
  PlannedCall result;
  result.error = refusal(call);
  if (!result.error.empty()) return result;
  const KernelRow* decode = call.pass == Pass::kForward ? choose(Pass::kDecode, call, built) : nullptr;
  const bool alone = decode && (!call.spec.packed() || traits_of(*decode).runs_every_sequence(*decode));
  const KernelRow* row = choose(call.pass, call, built);
  Call of_decode = call;
  const bool beaten = decode && row && traits_of(*row).beats_decode(*row, call);
  if (alone) {
    if (beaten) {
      decode = nullptr;
    } else {
      row = decode;
    }
  } else if (beaten) {
    of_decode.decodes_average = false;
    decode = choose(Pass::kDecode, of_decode, built);
  }
  if (!row) {
    result.error = no_kernel(call, built);
    return result;
  }
  find_score(*row, call, result.score);
  result.shared = traits_of(*row).shared_bytes(*row, call);
  Workspace workspace;
  if (decode) traits_of(*decode).plan_grid(*decode, of_decode, workspace, result);
  if (decode != row) traits_of(*row).plan_grid(*row, call, workspace, result);
  result.workspace = workspace.bytes;
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

Dim workspace_bound(Pass pass, const AttentionSpec& spec, const DimShapes& shapes) {
  const Dim own = bound_of(pass, spec, shapes);
  return pass == Pass::kForward ? bound_of(Pass::kDecode, spec, shapes) + own : own;
}

TileGrid tile_grid(const Call& call, int64_t rows, int64_t heads, int32_t tile, Workspace& workspace) {
  const Shapes& s = call.shapes;
  TileGrid grid;
  grid.block = tile;
  if (rows == 0 || heads == 0) return grid;
  if (call.spec.packed()) {
    grid.tiles = varlen_tiles(rows, s.batch, tile).value();
    grid.blocks = grid.tiles * heads * s.leading;
    grid.schedule = workspace.add(schedule_bytes(s.leading, s.batch, grid.tiles).value());
  } else {
    grid.tiles = ceil_div(rows, tile);
    grid.blocks = grid.tiles * heads * s.leading * s.batch;
  }
  return grid;
}

Shapes shapes_of(const Problem& p) {
  return {p.as<int64_t>(),   p.dtype,
          p.kv_dtype,        p.leading.count(),
          p.leading.rank,    {p.dbias_batch, p.dbias_heads, p.dbias_rows, p.dbias_columns},
          mask_sizes(p),     bias_in_tiles(p),
          bias_in_chunks(p), in_chunks(p.mask, p.leading, 1),
          has_float_bias(p)};
}

}  // namespace jax_flash
