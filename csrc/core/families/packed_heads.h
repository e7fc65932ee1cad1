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
  int64_t group, tokens, rows, all, sms;
  int64_t time, time_of_heads;  // of packed heads, and of single ones

  Tiles(const KernelRow& row, const Call& call)
      : group(call.shapes.heads / call.shapes.kv_heads),
        tokens(call.tokens()),
        rows(group * tokens),
        all(tiles_of(row, call, call.shapes.kv_heads, rows, row.block_m)),
        sms(std::max(1, call.device.sm_count)),
        time(time_of(row, call, call.shapes.kv_heads, rows, row.block_m)),
        time_of_heads(time_of(row, call, call.shapes.heads, tokens,
                              std::max(row.block_m, 2 * hopper::kConsumerRows))) {}

  bool fill_waves() const {
    constexpr double kFilled = 0.85;
    return all > 0 && static_cast<double>(all) >= kFilled * static_cast<double>(waves(all) * sms);
  }

 private:
  static int64_t tiles_of(const KernelRow& row, const Call& call, int64_t heads, int64_t rows,
                          int64_t block) {
    return call.entries() * heads * ceil_div(rows, block) * slices(row, call);
  }
  int64_t waves(int64_t tiles) const { return ceil_div(tiles, sms); }
  // The time of all waves. Each consumer with rows adds one to a tile's time, which is two without: on an
  // H200, tiles of 64, 128 and 192 rows of d64 take 65, 85 and 104 µs for 8,192 keys, of d128 75 and 98. If
  // CTAs have slices of V's columns, all of their consumers work on all rows.
  int64_t time_of(const KernelRow& row, const Call& call, int64_t heads, int64_t rows, int64_t block) const {
    const int64_t consumers = row.is_sliced() ? 1 : ceil_div(std::min(rows, block), hopper::kConsumerRows);
    return waves(tiles_of(row, call, heads, rows, block)) * (2 + consumers);
  }
};

// Whether decode takes longer. It splits keys, so that few or unequal sequences take no longer, but reads
// keys again for more rows than its tiles have. Tiles that leave SMs idle are faster only where it would read
// them many times.
inline bool beats_decode(const KernelRow& row, const Call& call) {
  constexpr int64_t kManyWaves = 3;  // of which lengths matter less
  // The KV heads whose keys decode reads in a unit of a tile's time: twice those measured (H200, d64 to
  // d512), since a tile takes as long as the longest sequence, and others may have half as many keys.
  const int64_t read_meanwhile = call.float8_pools() ? 72 : 28;
  const Tiles tiles(row, call);
  const bool narrow = call.shapes.head_dim <= 128, many = tiles.all >= kManyWaves * tiles.sms;
  const int64_t twice = narrow && !call.float8_pools() ? 32 : 16, once = narrow ? 16 : 8;
  if (tiles.fill_waves()) return tiles.rows > (many ? once : twice);
  const int64_t reads = tiles.rows / twice;
  return reads >= 2 && reads * call.entries() * call.shapes.kv_heads > read_meanwhile * tiles.time;
}

// Calls for which tiles of single heads would take longer, or decode would read keys several times. Keys are
// not split. All rows of a tile belong to one KV head. Packed sequences are taken to have equally many
// tokens, though in fact one may be a prompt, whose tiles are as fast as those of single heads; decode runs
// those with few rows before.
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
  return 16 * tiles.time <= 15 * tiles.time_of_heads ||
         (tiles.rows <= kMostDecodeRows && beats_decode(row, call));
}

}  // namespace jax_flash::packed_heads
