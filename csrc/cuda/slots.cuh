// The slots of tables that have an entry for each tile or block of rows (core/visible/row_blocks.h).
#pragma once

#include "core/sequence.h"
#include "core/visible/row_blocks.h"
#include "cuda/registry.h"
#include "cuda/work.cuh"

namespace jax_flash {

// The slots of a table, whose entries are of `block` rows each. In 32 bits, as divisions are slow in 64.
struct Slots {
  int32_t block;
  uint32_t count, tiles;  // slots of a leading entry, and in the fixed layouts of a batch entry

  // `rows`: those of a batch entry, or of all packed sequences.
  Slots(const Problem& p, int32_t rows, int32_t block)
      : block(block),
        count(static_cast<uint32_t>(slots_of_entry(p.packed(), rows, p.batch, block))),
        tiles(static_cast<uint32_t>(ceil_div(rows, block))) {}
};

// The rows of a slot, within a sequence. In packed sequences `row` may be negative or past the sequence's
// end: the slot then belongs to no sequence.
struct SlotRows {
  int64_t leading;
  int32_t index, row;  // the sequence, and the row's position in it
};

// The clamped starts of packed sequences, of all leading entries; null for the fixed layouts.
struct SequenceStarts {
  const int32_t *query = nullptr, *key = nullptr;
  int32_t apart = 0;  // stride of leading entries

  __device__ Sequence sequence(const Problem& p, int64_t leading, int32_t index) const {
    if (!query) return fixed_sequence(p, leading, index);
    if (p.paged()) return paged_sequence(p, leading, index, query + leading * apart);
    return varlen_sequence(p, leading, index, query + leading * apart, key + leading * apart);
  }
  template <Over over>
  __device__ SlotRows rows_of_slot(const Problem& p, const Slots& slots, uint32_t slot) const {
    const uint32_t leading = slot / slots.count, own = slot % slots.count;
    if (!query)
      return {leading, static_cast<int32_t>(own / slots.tiles),
              static_cast<int32_t>(own % slots.tiles) * slots.block};
    const int32_t* const starts = (over == Over::kQueries ? query : key) + int64_t{leading} * apart;
    const int32_t index = sequence_of_slot(starts, p.batch, slots.block, own);
    return {leading, index,
            static_cast<int32_t>(own - first_slot(starts[index], slots.block, index)) * slots.block};
  }
};

// `over`: the rows that the grid's schedule tiles.
inline SequenceStarts starts_of(const Problem& p, const TileGrid& grid, Over over, const void* workspace) {
  if (!p.packed()) return {};
  const int32_t* own = query_starts(p, grid, workspace);
  const int32_t* others = own + p.batch + 2;
  const bool queries = over == Over::kQueries;
  return {queries ? own : others, queries ? others : own, 2 * (p.batch + 2)};
}

// The query tiles, or blocks of rows, that see a key tile: the interval from the first to the last, and the
// longest gap of tiles in it that do not. Adds the bits of 32 tiles at a time.
struct SeenByQueries {
  Interval any{0, 0}, gap{0, 0};

  __device__ void add(uint32_t bits, int32_t first) {
    while (bits) {
      const int32_t begin = __ffs(static_cast<int>(bits)) - 1;
      const uint32_t unseen = ~(bits >> begin);
      const int32_t end = unseen ? begin + __ffs(static_cast<int>(unseen)) - 1 : 32;
      if (any.empty()) any = {first + begin, first + begin};
      if (first + begin - any.hi > gap.size()) gap = {any.hi, first + begin};
      any.hi = first + end;
      bits = end < 32 ? bits >> end << end : 0;
    }
  }
};

}  // namespace jax_flash
