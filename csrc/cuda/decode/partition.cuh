// Which keys each thread block of decode works on. Every block computes the partition itself from the
// lengths, so it depends on the call's operands alone.
//
// A column is one KV head, or a chunk of its query rows. The key tiles of all sequences, one sequence after
// the other, are divided into equal ranges, one for each block of a column. Where the call fixes the splits
// of a sequence, the unit of division is a split instead of a tile.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/band.h"
#include "core/plan/launch_plan.h"
#include "core/problem.h"
#include "core/sequence.h"
#include "core/split.h"

namespace jax_flash::decode {

// The arguments of a decode kernel.
struct Call {
  const Problem& p;
  const DecodeGrid& grid;
  const int32_t* starts;  // packed sequences: first rows [n + 1] of each leading entry, 2 · (n + 2) apart
};

// The query rows of a column. Row r is at position (first + r) / group, of query head
// kv_head · group + (first + r) % group. Rows whose position is past the sequence's queries are padding.
struct ColumnRows {
  int32_t kv_head, group;
  int32_t first, end;

  template <int kRows>
  __device__ __forceinline__ static ColumnRows of_column(const Call& call, int32_t column) {
    const Problem& p = call.p;
    const int32_t group = p.heads / p.kv_heads, all = p.packed() ? call.grid.packed_rows : p.q_rows * group;
    const int32_t chunks = (all + kRows - 1) / kRows, first = column % chunks * kRows;
    return {column / chunks, group, first, min(all, first + kRows)};
  }
  __device__ __forceinline__ int32_t count() const { return end - first; }
  __device__ __forceinline__ int32_t position(int32_t row) const { return (first + row) / group; }
  __device__ __forceinline__ int32_t head(int32_t row) const {
    return kv_head * group + (first + row) % group;
  }
  __device__ __forceinline__ int32_t first_position() const { return first / group; }
  __device__ __forceinline__ int32_t end_position() const { return (end - 1) / group + 1; }
};

// One sequence of one leading entry, as the rows of a column see it. `index` counts the sequences of all
// leading entries.
struct SequenceWork {
  int64_t leading;
  Sequence sequence;
  Band band;
  Interval keys;  // that at least one of the rows sees
  bool served;    // false: the forward kernel attends this sequence

  __device__ __forceinline__ SequenceWork(const Call& call, const ColumnRows& rows, int32_t index)
      : leading(index / call.p.batch) {
    const Problem& p = call.p;
    const int32_t z = index % p.batch;
    if (p.packed()) {
      sequence = paged_sequence(p, leading, z, call.starts + leading * 2 * (p.batch + 2));
      served = call.grid.takes(sequence.q_len, rows.group) && rows.first_position() < sequence.q_len;
    } else {
      sequence = fixed_sequence(p, leading, z);
      served = true;
    }
    band = make_band(p, leading, sequence);
    keys = band.rows(rows.first_position(), rows.end_position());
  }
  __device__ __forceinline__ int32_t end_position(const ColumnRows& rows) const {
    return min(rows.end_position(), sequence.q_len);
  }
};

// The key tiles of a sequence, and the work units that they form.
template <int kTile>
struct SequenceUnits {
  int32_t begin, count;  // tiles. A sequence without keys has one, since its results must be written too.
  int32_t units;         // splits where the call fixes them, else tiles
  int32_t unit_tiles;    // tiles per unit

  __device__ __forceinline__ SequenceUnits(const DecodeGrid& grid, const SequenceWork& work) {
    const Interval keys = work.keys;
    begin = keys.empty() ? 0 : keys.lo / kTile;
    count = keys.empty() ? 1 : (keys.hi - 1) / kTile + 1 - begin;
    unit_tiles = 1;
    if (grid.parts > 0) unit_tiles = (count - 1) / clamp_splits(grid.parts, {0, count}) + 1;
    if (grid.part_tiles > 0) unit_tiles = grid.part_tiles;
    units = work.served ? (count - 1) / unit_tiles + 1 : 0;
  }
};

// The ranges of units of a column's blocks.
struct Partition {
  int32_t total;        // units of all sequences
  int32_t ranges;       // that are not empty
  int32_t whole_units;  // where every range holds whole sequences: the units of a range; else 0

  __device__ __forceinline__ int32_t begin(int32_t range) const {
    if (whole_units) return min(int64_t{total}, int64_t{range} * whole_units);
    return ranges == 0 ? 0 : static_cast<int32_t>(int64_t{range} * total / ranges);
  }
  // The range that a unit belongs to, where ranges are equal.
  __device__ __forceinline__ int32_t owner(int32_t unit) const {
    return static_cast<int32_t>(((int64_t{unit} + 1) * ranges - 1) / total);
  }
};

// Computes the partition of a column and finds the sequence of a unit. All threads of a block take part: each
// counts the units of its share of the sequences, and a prefix sum joins them.
template <int kTile, int kThreads>
class Partitioner {
 public:
  struct Shared {
    int32_t sums[kThreads / 32], largest[kThreads / 32];
    int32_t index, base;
  };

  __device__ __forceinline__ Partitioner(const Call& decode, const ColumnRows& column_rows, Shared& state)
      : call(decode), rows(column_rows), shared(state) {
    const int32_t sequences = static_cast<int32_t>(call.p.leading.count() * call.p.batch);
    const int32_t share = (sequences - 1) / kThreads + 1;
    first = min(sequences, share * static_cast<int32_t>(threadIdx.x));
    const int32_t last = min(sequences, first + share);
    int32_t largest = 0;
    for (int32_t i = first; i < last; ++i) {
      const int32_t units = units_of(i);
      sum += units;
      largest = max(largest, units);
    }
    scan(largest);
    divide(sequences, largest);
  }

  Partition partition;

  // The sequence that a unit belongs to, and the sequence's first unit.
  struct Location {
    int32_t index, base;
  };
  __device__ __forceinline__ Location locate(int32_t unit) const {
    if (base <= unit && unit < base + sum) {
      Location at{first, base};
      for (int32_t units; unit >= at.base + (units = units_of(at.index)); ++at.index) at.base += units;
      shared.index = at.index;
      shared.base = at.base;
    }
    __syncthreads();
    return {shared.index, shared.base};
  }

 private:
  __device__ __forceinline__ int32_t units_of(int32_t index) const {
    return SequenceUnits<kTile>(call.grid, SequenceWork(call, rows, index)).units;
  }

  // base ← the sum of all earlier threads' units; partition.total and `largest` ← sum and maximum over the
  // block.
  __device__ __forceinline__ void scan(int32_t& largest) {
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
    int32_t through = sum;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int32_t before = __shfl_up_sync(~0u, through, step);
      if (lane >= step) through += before;
      largest = max(largest, __shfl_xor_sync(~0u, largest, step));
    }
    if (lane == 31) shared.sums[warp] = through, shared.largest[warp] = largest;
    __syncthreads();
    base = through - sum;
    partition.total = 0;
    for (int i = 0; i < kThreads / 32; ++i) {
      if (i < warp) base += shared.sums[i];
      partition.total += shared.sums[i];
      largest = max(largest, shared.largest[i]);
    }
  }

  // Ranges are equal, except that they hold whole sequences where all sequences have the same number of units
  // and the imbalance costs less than splitting would.
  __device__ __forceinline__ void divide(int32_t sequences, int32_t largest) {
    constexpr int64_t kSplitCost = 4;  // in tiles
    const int32_t total = partition.total, ranges = min(call.grid.ranges, total);
    partition.ranges = ranges;
    partition.whole_units = 0;
    if (total == 0 || call.grid.fixed_parts() || int64_t{largest} * sequences != total) return;
    const int64_t whole = int64_t{(sequences - 1) / ranges + 1} * largest;
    if (whole * ranges - total <= kSplitCost * ranges) partition.whole_units = static_cast<int32_t>(whole);
  }

  const Call& call;
  const ColumnRows& rows;
  Shared& shared;
  int32_t first, sum = 0,
                 base;  // this thread's first sequence, the units of its share, and all units before them
};

// Iterates over a block's range, segment by segment: a segment is the units of the range that lie in one
// sequence, or one split where the call fixes them. Within a segment it iterates over key tiles.
template <int kTile>
struct WorkIterator {
  int32_t unit, end;               // the segment's first unit, and the end of the range
  int32_t index, base;             // the segment's sequence, and that sequence's first unit
  int32_t units = 0, all = 0;      // of the segment, and of the sequence
  int32_t tile = 0, tile_end = 0;  // the tiles of the segment that remain

  __device__ __forceinline__ bool done() const { return unit >= end; }
  __device__ __forceinline__ bool covers_sequence() const { return units == all; }
  __device__ __forceinline__ bool begins_sequence() const { return unit == base; }

  // Opens the segment at `unit` and returns its sequence.
  __device__ __forceinline__ SequenceWork open(const Call& call, const ColumnRows& rows) {
    for (;; ++index) {
      const SequenceWork work(call, rows, index);
      const SequenceUnits<kTile> of_sequence(call.grid, work);
      if (of_sequence.units == 0) continue;
      open_segment(call.grid, of_sequence);
      return work;
    }
  }
  // Moves to the next segment, which open() opens unless the range is done.
  __device__ __forceinline__ void advance() {
    unit += units;
    if (unit == base + all) base = unit, ++index;
  }

 private:
  __device__ __forceinline__ void open_segment(const DecodeGrid& grid, const SequenceUnits<kTile>& sequence) {
    all = sequence.units;
    units = grid.fixed_parts() ? 1 : min(sequence.units - (unit - base), end - unit);
    tile = sequence.begin + (unit - base) * sequence.unit_tiles;
    tile_end = min(sequence.begin + sequence.count, tile + units * sequence.unit_tiles);
  }
};

}  // namespace jax_flash::decode
