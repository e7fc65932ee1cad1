// Which keys each thread block of decode works on. Every block computes the partition itself from the
// lengths, so it depends on the call's operands alone.
// The units of division are those of units.h.
#pragma once

#include <cstdint>

#include "core/band.h"
#include "core/split.h"
#include "cuda/decode/call.cuh"
#include "cuda/decode/sequence_work.cuh"

namespace jax_flash::decode {

template <int kTile>
__device__ __forceinline__ SequenceUnits units_of(const DecodeCall& call, const SequenceWork& work) {
  return {call.grid, call.end_tiles, SeenTiles<kTile>{call, work}.all(), work.served()};
}

// in_order() for the packed sequences of a call; all threads of a CTA call this.
__device__ __forceinline__ bool are_in_order(const DecodeCall& call) {
  const DecodeView& starts = call.starts;
  return in_order(starts.at<const int32_t>(0, 0, 0, 0), starts.batch, call.batch.value, call.q_rows,
                  call.batch.quotient(call.sequences), starts.leading);
}

// A block's range: its units, the sequence in which it begins, and that sequence's first unit. Empty if begin
// ≥ end.
struct Range {
  int32_t begin, end, index, base;
};

template <int kThreads>
struct PartitionShared {
  int32_t sums[kThreads / 32], largest[kThreads / 32];
  int32_t index, base, parts, units;
};

// sum ← the sum over this lane and those before it; `largest` ← the maximum over the warp.
__device__ __forceinline__ void scan_warp(int32_t& sum, int32_t& largest) {
  const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int32_t before = __shfl_up_sync(~0u, sum, step);
    if (lane >= step) sum += before;
    largest = max(largest, __shfl_xor_sync(~0u, largest, step));
  }
}

// sum ← the sum over all earlier threads; returns the sum over all threads; `largest` ← the maximum over all
// threads.
template <int kThreads>
__device__ __forceinline__ int32_t scan_block(PartitionShared<kThreads>& shared, int32_t& sum,
                                              int32_t& largest) {
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  int32_t through = sum;
  scan_warp(through, largest);
  if (lane == 31) shared.sums[warp] = through, shared.largest[warp] = largest;
  __syncthreads();
  sum = through - sum;
  int32_t total = 0;
#pragma unroll
  for (int i = 0; i < kThreads / 32; ++i) {
    if (i < warp) sum += shared.sums[i];
    total += shared.sums[i];
    largest = max(largest, shared.largest[i]);
  }
  return total;
}

// Opens a range that is not empty and begins in sequence `index`, whose first unit is `base`. If it begins in
// the units that stand for the end of this sequence, it opens at the next sequence.
__device__ __forceinline__ void begin_range(Range& range, int32_t index, int32_t base, int32_t parts,
                                            int32_t units) {
  const bool past = range.begin - base >= parts;
  range.index = past ? index + 1 : index, range.base = past ? base + units : base;
  range.begin = max(range.begin, range.base);
}

// find_range() for at most 32 sequences. Each warp computes it by itself, because a barrier would take
// longer.
template <int kTile, class Rows>
__device__ __forceinline__ Partition find_range_by_warp(const DecodeCall& call, const Rows& rows,
                                                        int32_t number, Range& range) {
  const int32_t lane = static_cast<int32_t>(threadIdx.x % 32);
  if (call.sequences == 1) {
    const SequenceUnits own = units_of<kTile>(call, rows.sequence(call, 0));
    const Partition partition(call.grid, 1, own.units, own.units);
    range.begin = partition.begin(number), range.end = partition.begin(number + 1);
    begin_range(range, 0, 0, own.parts, own.units);
    return partition;
  }
  int32_t parts = 0, units = 0;
  if (lane < call.sequences) {
    const SequenceUnits own = units_of<kTile>(call, rows.sequence(call, lane));
    parts = own.parts, units = own.units;
  }
  int32_t through = units, largest = units;
  scan_warp(through, largest);
  const Partition partition(call.grid, call.sequences, __shfl_sync(~0u, through, 31), largest);
  range.begin = partition.begin(number), range.end = partition.begin(number + 1);
  if (range.begin >= range.end) return partition;
  const bool begins = through - units <= range.begin && range.begin < through;
  const int owner = __ffs(static_cast<int>(__ballot_sync(~0u, begins))) - 1;
  units = __shfl_sync(~0u, units, owner);
  begin_range(range, owner, __shfl_sync(~0u, through, owner) - units, __shfl_sync(~0u, parts, owner), units);
  return partition;
}

// Computes the partition of a column, and range `number` of it. All threads of a block take part: each counts
// the units of its share of the sequences, and a prefix sum joins them. The thread in whose share the range
// begins then finds the sequence. rows.sequence(call, number): the SequenceWork of a sequence as the column's
// rows see it.
template <int kTile, int kThreads, class Rows>
__device__ __forceinline__ Partition find_range(const DecodeCall& call, const Rows& rows,
                                                PartitionShared<kThreads>& shared, int32_t number,
                                                Range& range) {
  if (call.same_lengths) {
    const Partition& partition = call.partition;
    range.begin = partition.begin(number), range.end = partition.begin(number + 1);
    const int32_t index = call.units.quotient(range.begin), units = call.units.value;
    begin_range(range, index, index * units, units - call.end_tiles, units);
    return partition;
  }
  if (call.sequences <= 32) return find_range_by_warp<kTile>(call, rows, number, range);
  const int32_t sequences = call.sequences, share = (sequences - 1) / kThreads + 1;
  const int32_t first = min(sequences, share * static_cast<int32_t>(threadIdx.x));
  const int32_t last = min(sequences, first + share);
  Partition partition;
  int32_t base = 0, end = 0;  // units of earlier threads' sequences, and through this thread's
#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {
    int32_t at = base, largest = 0;
#pragma unroll 1
    for (int32_t i = first; i < last && (pass == 0 || at <= range.begin); ++i) {
      const SequenceUnits units = units_of<kTile>(call, rows.sequence(call, i));
      if (pass > 0 && range.begin < at + units.units)
        shared.index = i, shared.base = at, shared.parts = units.parts, shared.units = units.units;
      at += units.units, largest = max(largest, units.units);
    }
    if (pass > 0) break;
    base = at;
    const int32_t total = scan_block<kThreads>(shared, base, largest);
    end = base + at;
    partition = Partition(call.grid, sequences, total, largest);
    range.begin = partition.begin(number), range.end = partition.begin(number + 1);
    if (range.begin >= range.end) return partition;
    if (range.begin < base || range.begin >= end) break;
  }
  __syncthreads();
  begin_range(range, shared.index, shared.base, shared.parts, shared.units);
  return partition;
}

// Iterates over a block's range, segment by segment: a segment is the units of the range that lie in one
// sequence, or one split where the call fixes them. Within a segment it iterates over key tiles, by their
// numbers in SeenTiles.
template <int kTile>
struct WorkIterator {
  int32_t unit, end;               // the segment's first unit, and the end of the range
  int32_t index, base;             // the segment's sequence, and that sequence's first unit
  int32_t parts = 0, all = -1;     // parts of the segment, and of the sequence
  int32_t next_base = 0;           // the first unit of the next sequence
  int32_t tile = 0, tile_end = 0;  // the tiles of the segment that remain

  __device__ __forceinline__ explicit WorkIterator(const Range& range)
      : unit(range.begin), end(range.end), index(range.index), base(range.base) {}

  __device__ __forceinline__ bool done() const { return unit >= end; }
  __device__ __forceinline__ bool covers_sequence() const { return parts == all; }

  // Opens the segment at `unit` and returns its sequence.
  template <class Rows>
  __device__ __forceinline__ SequenceWork open(const DecodeCall& call, const Rows& rows) {
#pragma unroll 1
    for (;; ++index) {
      const SequenceWork work = rows.sequence(call, index);
      const SequenceUnits sequence = units_of<kTile>(call, work);
      if (sequence.units == 0) continue;
      const int32_t before = unit - base;
      all = sequence.parts, next_base = base + sequence.units;
      parts = call.grid.fixed_parts() ? 1 : min(all - before, end - unit);
      tile = sequence.begin + before * sequence.unit_tiles;
      tile_end = min(sequence.begin + sequence.count, tile + parts * sequence.unit_tiles);
      return work;
    }
  }
  // Moves to the next segment (at first, to the first one). open() opens it unless the range is done.
  __device__ __forceinline__ void advance() {
    unit += parts;
    if (unit == base + all) unit = base = next_base, ++index;
  }
};

}  // namespace jax_flash::decode
