// Which tiles of keys a block of decode works on: every block finds that out itself, from the lengths.
//
// The tiles of all sequences, one after the other, are cut into equal ranges, one for each block of a column.
// Where the parts of a sequence are given, they take the place of tiles. Nothing but the call's operands
// decides.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/band.h"
#include "core/plan.h"
#include "core/problem.h"
#include "core/sequence.h"
#include "core/split.h"

namespace jax_flash::decode {

// What a kernel of decode is given.
struct Call {
  const Problem& p;
  const DecodeGrid& grid;
  const int32_t* starts;  // of packed sequences: [n + 1] each 2 · (n + 2) apart for every leading entry
};

// The rows of a column: row r is position r / group of query head kv_head · group + r % group. Those past the
// queries of a sequence stand for nothing.
struct Rows {
  int32_t kv_head, group;
  int32_t first, end;

  template <int kRows>
  __device__ __forceinline__ static Rows of_column(const Call& call, int32_t column) {
    const Problem& p = call.p;
    const int32_t group = p.heads / p.kv_heads, all = p.packed() ? call.grid.packed_rows : p.q_rows * group;
    const int32_t chunks = (all + kRows - 1) / kRows, first = column % chunks * kRows;
    return {column / chunks, group, first, min(all, first + kRows)};
  }
  __device__ __forceinline__ int32_t position(int32_t row) const { return (first + row) / group; }
  __device__ __forceinline__ int32_t head(int32_t row) const {
    return kv_head * group + (first + row) % group;
  }
  __device__ __forceinline__ int32_t first_position() const { return first / group; }
  __device__ __forceinline__ int32_t end_position() const { return (end - 1) / group + 1; }
};

// A sequence of any leading entry.
struct Entry {
  int64_t leading;
  Sequence sequence;
  Band band;
  Interval keys;  // that any of the rows sees
  bool taken;     // by decode: other sequences are the forward's

  __device__ __forceinline__ Entry(const Call& call, const Rows& rows, int32_t index)
      : leading(index / call.p.batch) {
    const Problem& p = call.p;
    const int32_t z = index % p.batch;
    if (p.packed()) {
      sequence = paged_sequence(p, leading, z, call.starts + leading * 2 * (p.batch + 2));
      taken = call.grid.takes(sequence.q_len, rows.group) && rows.first_position() < sequence.q_len;
    } else {
      sequence = fixed_sequence(p, leading, z);
      taken = true;
    }
    band = make_band(p, leading, sequence);
    keys = band.rows(rows.first_position(), rows.end_position());
  }
  __device__ __forceinline__ int32_t end_position(const Rows& rows) const {
    return min(rows.end_position(), sequence.q_len);
  }
};

// What a sequence's keys are cut into.
template <int kTile>
struct Tiles {
  int32_t begin, count;  // of tiles, never none of a sequence taken: without keys it has results too
  int32_t units;         // parts, or tiles where parts are not given
  int32_t unit_tiles;

  __device__ __forceinline__ Tiles(const DecodeGrid& grid, const Entry& entry) {
    const Interval keys = entry.keys;
    begin = keys.empty() ? 0 : keys.lo / kTile;
    count = keys.empty() ? 1 : (keys.hi - 1) / kTile + 1 - begin;
    unit_tiles = 1;
    if (grid.parts > 0) unit_tiles = (count - 1) / clamp_splits(grid.parts, {0, count}) + 1;
    if (grid.part_tiles > 0) unit_tiles = grid.part_tiles;
    units = entry.taken ? (count - 1) / unit_tiles + 1 : 0;
  }
};

// Where the ranges of a column's blocks begin.
struct Partition {
  int32_t total;   // units
  int32_t ranges;  // that are not empty
  int32_t whole;   // units of a range of whole sequences; 0: ranges are equal

  __device__ __forceinline__ int32_t begin(int32_t range) const {
    if (whole) return min(int64_t{total}, int64_t{range} * whole);
    return ranges == 0 ? 0 : static_cast<int32_t>(int64_t{range} * total / ranges);
  }
  __device__ __forceinline__ int32_t owner(int32_t unit) const {
    return static_cast<int32_t>(((int64_t{unit} + 1) * ranges - 1) / total);
  }
};

// Finds where the units of a column lie; by all threads of a block, each of which looks at a share of the
// sequences.
template <int kTile, int kThreads>
class Finder {
 public:
  struct Shared {
    int32_t sums[kThreads / 32], largest[kThreads / 32];
    int32_t entry, base;
  };

  __device__ __forceinline__ Finder(const Call& decode, const Rows& column_rows, Shared& state)
      : call(decode), rows(column_rows), shared(state) {
    const int32_t entries = static_cast<int32_t>(call.p.leading.count() * call.p.batch);
    const int32_t share = (entries - 1) / kThreads + 1;
    first = min(entries, share * static_cast<int32_t>(threadIdx.x));
    const int32_t last = min(entries, first + share);
    int32_t largest = 0;
    for (int32_t e = first; e < last; ++e) {
      const int32_t units = units_of(e);
      sum += units;
      largest = max(largest, units);
    }
    share_sums(largest);
    cut(entries, largest);
  }

  Partition partition;

  // The sequence that holds a unit, and its first one.
  struct Place {
    int32_t entry, base;
  };
  __device__ __forceinline__ Place locate(int32_t unit) const {
    if (base <= unit && unit < base + sum) {
      Place at{first, base};
      for (int32_t units; unit >= at.base + (units = units_of(at.entry)); ++at.entry) at.base += units;
      shared.entry = at.entry;
      shared.base = at.base;
    }
    __syncthreads();
    return {shared.entry, shared.base};
  }

 private:
  __device__ __forceinline__ int32_t units_of(int32_t entry) const {
    return Tiles<kTile>(call.grid, Entry(call, rows, entry)).units;
  }

  // base: the sum of the threads before; largest, partition.total: of all threads.
  __device__ __forceinline__ void share_sums(int32_t& largest) {
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

  // Equal ranges, unless all sequences are alike and ranges of whole ones cost less than cutting does.
  __device__ __forceinline__ void cut(int32_t entries, int32_t largest) {
    constexpr int64_t kCostOfCutting = 4;  // tiles
    const int32_t total = partition.total, ranges = min(call.grid.ranges, total);
    partition.ranges = ranges;
    partition.whole = 0;
    if (total == 0 || call.grid.fixed_parts() || int64_t{largest} * entries != total) return;
    const int64_t whole = int64_t{(entries - 1) / ranges + 1} * largest;
    if (whole * ranges - total <= kCostOfCutting * ranges) partition.whole = static_cast<int32_t>(whole);
  }

  const Call& call;
  const Rows& rows;
  Shared& shared;
  int32_t first, sum = 0, base;  // this thread's first sequence, the units of its share, and those before
};

// Walks over a block's range: segments of it that lie in one sequence, or are one part of it, and their
// tiles.
template <int kTile>
struct Cursor {
  int32_t unit, end;               // the segment's first unit, and where the range ends
  int32_t entry, base;             // the sequence, and its first unit
  int32_t units = 0, all = 0;      // of the segment, and of the sequence
  int32_t tile = 0, tile_end = 0;  // that are left of the segment

  __device__ __forceinline__ bool done() const { return unit >= end; }
  __device__ __forceinline__ bool whole() const { return units == all; }
  __device__ __forceinline__ bool begins_sequence() const { return unit == base; }

  // The segment's sequence.
  __device__ __forceinline__ Entry open(const Call& call, const Rows& rows) {
    for (;; ++entry) {
      const Entry found(call, rows, entry);
      const Tiles<kTile> tiles(call.grid, found);
      if (tiles.units == 0) continue;
      enter(call.grid, tiles);
      return found;
    }
  }
  // To the next segment, which is to be opened unless the range is done.
  __device__ __forceinline__ void next() {
    unit += units;
    if (unit == base + all) base = unit, ++entry;
  }

 private:
  __device__ __forceinline__ void enter(const DecodeGrid& grid, const Tiles<kTile>& tiles) {
    all = tiles.units;
    units = grid.fixed_parts() ? 1 : min(tiles.units - (unit - base), end - unit);
    tile = tiles.begin + (unit - base) * tiles.unit_tiles;
    tile_end = min(tiles.begin + tiles.count, tile + units * tiles.unit_tiles);
  }
};

}  // namespace jax_flash::decode
