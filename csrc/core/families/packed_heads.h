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

// The query tiles of a call.
struct Tiles {
  int64_t group, tokens, rows, of_group, all, sms;

  Tiles(const KernelRow& row, const Call& call)
      : group(call.shapes.heads / call.shapes.kv_heads),
        tokens(call.tokens()),
        rows(group * tokens),
        of_group(ceil_div(rows, row.block_m)),
        all(call.entries() * call.shapes.kv_heads * of_group * slices(row, call)),
        sms(std::max(1, call.device.sm_count)) {}

  bool fill_waves() const {
    constexpr double kFilled = 0.85;
    return all > 0 && static_cast<double>(all) >= kFilled * static_cast<double>(ceil_div(all, sms) * sms);
  }
};

// Whether decode takes longer. It splits keys, so that sequences of different lengths take no longer, but
// reads keys again for more rows than its tiles have.
inline bool beats_decode(const KernelRow& row, const Call& call) {
  constexpr int64_t kManyWaves = 3;  // of which lengths matter less
  const Tiles tiles(row, call);
  const bool narrow = call.shapes.head_dim <= 128, many = tiles.all >= kManyWaves * tiles.sms;
  const int64_t twice = narrow && !call.float8_pools() ? 32 : 16, once = narrow ? 16 : 8;
  return tiles.fill_waves() && tiles.rows > (many ? once : twice);
}

// Calls with a few tokens per sequence, for which decode would read keys several times. Keys are not split,
// so the tiles must fill whole waves. All rows of a tile belong to one KV head. Packed sequences are taken to
// have equally many tokens, though in fact one may be a prompt, whose tiles are as fast as those of single
// heads; decode runs those with few rows before.
inline bool serves(const KernelRow& row, const Call& call) {
  constexpr int64_t kMostTokens = 16;  // over contiguous keys: more fill tiles of one head
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
  const Tiles tiles(row, call);
  if (hopper::kConsumerRows % tiles.group) return false;
  if (!spec.paged() && (tiles.group == 1 || tiles.tokens > kMostTokens)) return false;
  if (latent::Decode::are_latent(spec, dims_of(s))) return false;  // latent kernels read each key once
  // A tile of packed heads takes as long as one of a single head, so they have to be fewer.
  const int64_t tile_of_head = std::max(row.block_m, 2 * hopper::kConsumerRows);
  const bool fewer = 8 * tiles.of_group <= 7 * tiles.group * ceil_div(tiles.tokens, tile_of_head);
  if (!spec.packed()) return (fewer || tiles.rows <= hopper::kConsumerRows) && beats_decode(row, call);
  // Those of single heads are no faster if packed heads fill one consumer, or if they need several waves.
  const bool no_slower =
      tiles.rows <= hopper::kConsumerRows || call.entries() * s.heads > tiles.sms || tiles.fill_waves();
  return fewer && no_slower;
}

}  // namespace jax_flash::packed_heads
