// Which rows of the other side segments leave to a tile of queries, or of keys: an interval, from the first
// to the last that may share a segment with the tile. Segments may be numbered in any order.
#pragma once

#include "band.h"

namespace jax_flash {

// The segments of some rows, or a few more: those from lo to hi whose bit is set. Documents that are numbered
// in order have disjoint [lo, hi]. A tile with the last document and padding, which has a number of its
// own, has no bit for the documents between these two.
struct SegmentSet {
  int32_t lo = INT32_MAX, hi = INT32_MIN;
  uint64_t bits = 0;  // bit s % 64 of segment s

  JF_HD void add(int32_t segment) { add({segment, segment, bit(segment)}); }

  JF_HD void add(const SegmentSet& other) {
    lo = other.lo < lo ? other.lo : lo;
    hi = other.hi > hi ? other.hi : hi;
    bits |= other.bits;
  }

  JF_HD bool may_have(int32_t segment) const {
    return lo <= segment && segment <= hi && (bits & bit(segment)) != 0;
  }

  JF_HD static uint64_t bit(int32_t segment) { return uint64_t{1} << (static_cast<uint32_t>(segment) % 64); }
};

}  // namespace jax_flash
