// Input of the plan: a call's options and sizes, and the device.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/plan/dim.h"
#include "core/plan/row.h"
#include "core/problem.h"

namespace jax_flash {

struct Device {
  int32_t capability;  // 90 for 9.0
  int32_t sm_count;
  int32_t shared_memory;        // bytes that one CTA may use
  bool always_cluster = false;  // for tests: clusters wherever a row has a kernel for them

  bool operator==(const Device&) const = default;
};

// The part of a Problem that a plan depends on.
struct Shapes : Sizes<int64_t> {  // page_size and draft_rows are 0 without pages or draft mask
  DType dtype;
  DType kv_dtype;   // dtype, or float8
  int64_t leading;  // product of the leading dimensions
  int32_t leading_rank;
  int64_t bias[4];  // only for the bias gradient: sizes of dbias, 1 where it is reduced
  MaskSizes<int64_t> mask;
  bool bias_in_tiles = false;  // TMA can load tiles of the bias
  // Whether the bias, and the mask, can be copied 8 keys at a time; a bias must also have query's 16-bit
  // dtype, or float32.
  bool bias_in_chunks = false, mask_in_chunks = false;
  bool float_bias = false;  // the bias is float32, and query is not

  bool operator==(const Shapes&) const = default;
};

Shapes shapes_of(const Problem& problem);

// Query rows of a KV head over pages up to which decode is faster than the forward; with more, calls are
// compute-bound.
inline constexpr int64_t kMostDecodeRows = 64;

// One call on one device.
struct Call {
  Pass pass;
  const AttentionSpec& spec;
  const Shapes& shapes;
  const Device& device;
  // Whether decode is planned for packed sequences of the average number of tokens, or else of one token.
  bool decodes_average = true;

  Loader loader() const { return spec.paged() ? Loader::kPaged : Loader::kDense; }
  bool float8_pools() const { return shapes.kv_dtype != shapes.dtype; }
  // Whether rows of float8 pools can be copied 16 bytes at a time.
  bool float8_chunks_are_whole() const {
    return shapes.head_dim % 16 == 0 && shapes.value_dim % 16 == 0 && shapes.pool_columns % 16 == 0 &&
           spec.value_start % 16 == 0;
  }
  // The batch entries, or sequences, of all leading entries.
  int64_t entries() const { return shapes.leading * shapes.batch; }
  // Arrays of query rows that tiles divide: batch entries, or batches of packed sequences.
  int64_t row_arrays() const { return shapes.leading * (spec.packed() ? 1 : shapes.batch); }

  // Query tokens of a sequence, in packed batches on average, rounded up.
  int64_t tokens() const {
    return spec.packed() ? ceil_div(shapes.q_rows, std::max<int64_t>(1, shapes.batch)) : shapes.q_rows;
  }

  // Query rows that read one KV head: all rows of a sequence. In packed batches, whose lengths are unknown,
  // it assumes as many tokens as the draft mask has rows, or as sequences have on average, if decode serves
  // as many rows, else one token. In batch-invariant mode the average does not decide.
  int64_t rows_of_group() const {
    if (shapes.kv_heads == 0) return 0;
    const int64_t group = shapes.heads / shapes.kv_heads;
    if (!spec.packed()) return group * shapes.q_rows;
    const bool average = decodes_average && !spec.batch_invariant;
    const int64_t assumed = group * (shapes.draft_rows > 0 ? shapes.draft_rows : average ? tokens() : 1);
    return 0 < assumed && assumed <= kMostDecodeRows ? assumed : group;
  }

  // The rows of each sequence, if packed ones are divided equally.
  int64_t of_each_sequence(int64_t packed_rows) const {
    return packed_rows / std::max<int64_t>(1, shapes.batch);
  }
  int64_t rows_of_sequence() const { return spec.packed() ? of_each_sequence(shapes.q_rows) : shapes.q_rows; }

  // Upper bound of the keys that a query row sees; packed keys are assumed to be divided equally.
  int64_t visible_keys() const {
    const bool packed = spec.layout == Layout::kVarlen;
    const int64_t keys = packed ? of_each_sequence(shapes.k_rows) : shapes.k_rows;
    if (spec.left < 0 || spec.right < 0) return keys;
    return std::min(keys, int64_t{spec.left} + 1 + spec.right);
  }

  // Whether query tiles may see different numbers of keys, so that some CTAs finish earlier than others.
  bool tiles_differ() const {
    bool differ = spec.packed() || spec.paged() || spec.left >= 0 || spec.right >= 0 || spec.moves_band();
    for (Operand operand : {Operand::kQLengths, Operand::kKvLengths, Operand::kQSegmentIds, Operand::kRanges,
                            Operand::kMask, Operand::kBlockMask})
      differ |= spec.has(operand);
    return differ;
  }
};

}  // namespace jax_flash
