// The segments of a tile's rows, which tell whether rows of another tile may share one with it. Ids may be in
// any order.
#pragma once

#include "band.h"

namespace jax_flash {

// A superset of the segment ids of some rows: the ids from lo to hi whose bit is set. If documents are
// numbered in order, tiles of different documents have disjoint [lo, hi]. A tile that ends in padding may
// have a wide [lo, hi], because padding's id may be far from the documents'; bits exclude most ids between
// them.
struct SegmentSet {
  int32_t lo = INT32_MAX, hi = INT32_MIN;
  uint64_t bits = 0;  // segment s sets bit s % 64

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
