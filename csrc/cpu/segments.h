// The interval of keys that segments leave to a set of rows; vector instructions compare the ids.
#pragma once

#include "isa.h"
// isa.h goes first: it makes the core force-inlined.
#include "../core/segments.h"
#include "panels.h"
#include "scores.h"

namespace jax_flash::JF_ISA {

// The segment ids of some rows of a head, and of its keys.
struct RowSegments {
  SegmentSet rows;
  const int32_t* keys = nullptr;  // from key 0 on; null: the call has no segments

  RowSegments() = default;

  // The segments of rows [i0, i1), as far as they are in use.
  RowSegments(const Head& head, int32_t i0, int32_t i1) {
    const View &q = head.problem.q_segment_ids, &k = head.problem.kv_segment_ids;
    if (!q) return;
    const int32_t sequence = head.sequence.index;
    keys = reinterpret_cast<const int32_t*>(element(head, k, k.offset(sequence, 0, 0), 4));
    const auto* ids = reinterpret_cast<const int32_t*>(element(head, q, q.offset(sequence, 0, 0), 4));
    for (int32_t i = i0; i < min(i1, head.band.q_len); ++i) rows.add(ids[i]);
  }

  // The part of `range` from the first to the last key that may share a segment with one of the rows.
  Interval trim(Interval range) const {
    if (!keys || range.empty()) return range;
    Int first = Int{} + range.hi, last = Int{} + range.lo;
    for (int32_t j = range.lo; j < range.hi; j += kLanes) {
      const Int key = lane_indices() + j, seen = may_have(load_segments(j, range.hi));
      first = seen & (key < first) ? key : first;
      last = seen ? key + 1 : last;
    }
    Interval left{range.hi, range.lo};
    for (int lane = 0; lane < kLanes; ++lane) left = {min(left.lo, first[lane]), max(left.hi, last[lane])};
    return {left.lo, min(left.hi, range.hi)};
  }

  // Whether some key of the interval and some row belong to different segments.
  bool differ_from(Interval range) const {
    if (!keys || range.empty()) return false;
    Int differs = Int{} + (rows.lo != rows.hi);
    for (int32_t j = range.lo; j < range.hi; j += kLanes) differs |= load_segments(j, range.hi) ^ rows.lo;
    int32_t any = 0;
    for (int lane = 0; lane < kLanes; ++lane) any |= differs[lane];
    return any != 0;
  }

 private:
  // The segments of keys [j, j + kLanes); from `end` on the last key's segment is repeated.
  JF_HD Int load_segments(int32_t j, int32_t end) const {
    if (j + kLanes <= end)
      return reinterpret_cast<Int>(static_cast<UInt>(*reinterpret_cast<const UIntUnaligned*>(keys + j)));
    Int segments;
    for (int lane = 0; lane < kLanes; ++lane) segments[lane] = keys[min(j + lane, end - 1)];
    return segments;
  }

  // SegmentSet::may_have of each lane.
  JF_HD Int may_have(Int segment) const {
    const UInt number = reinterpret_cast<UInt>(segment);
    const UInt bits = (number & 32) != 0 ? UInt{} + static_cast<uint32_t>(rows.bits >> 32)
                                         : UInt{} + static_cast<uint32_t>(rows.bits);
    return (segment >= rows.lo) & (segment <= rows.hi) & ((bits >> (number & 31) & 1) != 0);
  }
};

// Sets, for each of `count` tiles of queries, the keys of a tile that segments, ranges and masks leave to it.
// Returns the keys that any of them may see; without ranges and masks these are all or none.
template <class QueryRows>
JF_INLINE Interval trim_to_seen(const Head& head, QueryRows* tiles, int32_t count, Interval keys) {
  Interval any{0, 0};
  for (int32_t i = 0; i < count; ++i) {
    const RowTile& tile = *tiles[i].tile;
    tiles[i].keys = keys;
    if (head.ranges) tiles[i].keys = head.seen_by_any({tile.begin, tile.end, tile.heads}, keys);
    tiles[i].keys = tiles[i].segments.trim(tiles[i].keys);
    if (head.hides_panels && !tiles[i].keys.empty()) {
      const int32_t j0 = round_down(tiles[i].keys.lo, kPanel);
      const Columns own{tiles[i].keys.lo - j0, tiles[i].keys.hi - j0};
      const Columns left = seen_panels(head, {tile.begin, tile.end, tile.heads}, own, j0).hull(own);
      tiles[i].keys = {j0 + left.lo, j0 + left.hi};
    }
    any = hull_of(any, tiles[i].keys);
  }
  return head.ranges || head.hides_panels || any.empty() ? any : keys;
}

}  // namespace jax_flash::JF_ISA
