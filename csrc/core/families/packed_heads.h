// Which calls run the Hopper forward whose tiles hold all query heads of a KV head.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/families/hopper_layout.h"
#include "core/families/latent.h"
#include "core/plan/call.h"
#include "core/plan/row.h"

namespace jax_flash::packed_heads {

// CTAs of a query tile, each with a slice of V's columns.
inline int64_t slices(const KernelRow& row, const Call& call) {
  return row.is_sliced() ? slices_of(call.shapes.value_dim, row.slice_columns()) : 1;
}

// Tokens of the smallest query tile, in which heads may be packed.
inline int64_t least_tokens(const DimShapes& s) {
  if (!s.heads.known() || !s.kv_heads.known()) return 1;
  const int64_t group = s.heads.value() / std::max<int64_t>(1, s.kv_heads.value());
  return std::clamp<int64_t>(hopper::kConsumerRows / std::max<int64_t>(1, group), 1, kSmallestTile);
}

// Calls with a few tokens per sequence, for which decode would read keys several times. Keys are not split,
// so the tiles must fill whole waves. All rows of a tile belong to one KV head. Packed sequences are taken to
// have equally many tokens, though in fact one may be a prompt, whose tiles are about as fast as those of
// single heads; decode runs those with few rows before.
inline bool serves(const KernelRow& row, const Call& call) {
  constexpr int64_t kMostTokens = 16;  // over contiguous keys: more fill tiles of one head
  constexpr double kFilled = 0.85;
  constexpr int64_t kManyWaves = 3;
  const AttentionSpec& spec = call.spec;
  const Shapes& s = call.shapes;
  if (s.leading_rank > 0 || s.heads == 0 || s.batch == 0 || spec.num_splits > 0 || spec.batch_invariant)
    return false;
  constexpr int32_t kOfPackedHeads = bits_of(Operand::kCuSeqlensQ, Operand::kCuSeqlensK, Operand::kKvLengths,
                                             Operand::kBlockTables, Operand::kKScale, Operand::kVScale,
                                             Operand::kDraftMask, Operand::kSinks, Operand::kAlibiSlopes);
  if (spec.operands & ~kOfPackedHeads) return false;
  const bool counts_tokens = spec.left >= 0 || spec.right >= 0 || spec.has(Operand::kAlibiSlopes);
  if (counts_tokens && spec.align != Align::kBottomRight) return false;
  const int64_t group = s.heads / s.kv_heads, tokens = spec.packed() ? ceil_div(s.q_rows, s.batch) : s.q_rows,
                rows = group * tokens, tiles_of_group = ceil_div(rows, row.block_m);
  if (hopper::kConsumerRows % group || (!spec.paged() && (group == 1 || tokens > kMostTokens))) return false;
  if (latent::Decode::are_latent(spec, dims_of(s))) return false;  // latent kernels read each key once
  const int64_t tiles = call.entries() * s.kv_heads * tiles_of_group * slices(row, call);
  const int64_t sms = std::max(1, call.device.sm_count);
  // In packed batches the alternative is tiles of single heads, which are no faster if packed heads fill one
  // consumer, or if they need more than one wave.
  const bool are_fewer = spec.packed() && (rows <= hopper::kConsumerRows || call.entries() * s.heads > sms);
  const bool fill =
      tiles > 0 && static_cast<double>(tiles) >= kFilled * static_cast<double>(ceil_div(tiles, sms) * sms);
  if (!are_fewer && !fill) return false;
  // A tile of packed heads takes as long as one of a single head, so they have to be fewer. In the fixed
  // layouts the alternative for few rows is decode.
  const int64_t of_heads = group * ceil_div(tokens, std::max(row.block_m, 2 * hopper::kConsumerRows));
  const bool may_decode = !spec.packed() && rows <= hopper::kConsumerRows;
  if (!may_decode && 8 * tiles_of_group > 7 * of_heads) return false;
  if (spec.packed()) return true;
  // Up to these, decode, which splits keys, so that sequences of different lengths take no longer. Where
  // tiles are many, they do not either, and decode is slower with more rows than its tiles have.
  const bool narrow = s.head_dim <= 128, many = tiles >= kManyWaves * sms;
  const int64_t decode_rows = narrow && !call.float8_pools() ? 32 : 16, once = narrow ? 16 : 8;
  return rows > (many ? once : decode_rows);
}

}  // namespace jax_flash::packed_heads
