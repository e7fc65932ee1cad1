// The band: the keys around the diagonal that lengths, causal and window leave visible, for a row or a tile.
#pragma once

#include "sequence.h"
#include "spec.h"

namespace jax_flash {

// A range [lo, hi); empty when hi <= lo.
struct Interval {
  int32_t lo, hi;

  JF_HD bool empty() const { return hi <= lo; }
  JF_HD int32_t size() const { return hi > lo ? hi - lo : 0; }
  JF_HD bool contains(int32_t x) const { return lo <= x && x < hi; }
};

JF_HD Interval intersect(Interval a, Interval b) {
  return {a.lo > b.lo ? a.lo : b.lo, a.hi < b.hi ? a.hi : b.hi};
}

// The tiles of `block` rows that contain the rows.
JF_HD Interval tiles_of(Interval rows, int32_t block) {
  return rows.empty() ? Interval{0, 0} : Interval{rows.lo / block, (rows.hi - 1) / block + 1};
}

enum class TileClass : int32_t { kSkip, kPartial, kFull };

// If i < q_len, row i sees keys [i + shift - left, i + shift + right] within [0, k_len). Positions are
// within the sequence. Segments, mask and bias may hide more keys.
struct Band {
  int32_t q_len, k_len;
  int64_t shift, left, right;

  JF_HD int64_t diagonal(int32_t i) const { return i + shift; }

  JF_HD int32_t first_key(int32_t i) const { return clamp(diagonal(i) - left, k_len); }
  JF_HD int32_t last_key(int32_t i) const { return clamp(diagonal(i) + right + 1, k_len); }  // exclusive

  JF_HD Interval row(int32_t i) const {
    if (i < 0 || i >= q_len) return {0, 0};
    return {first_key(i), last_key(i)};
  }

  // The range from the first to the last key that any of the rows [i0, i1) sees.
  JF_HD Interval rows(int32_t i0, int32_t i1) const {
    if (i1 > q_len) i1 = q_len;
    if (i1 <= i0) return {0, 0};
    return {first_key(i0), last_key(i1 - 1)};
  }

  // The keys that all of the rows [i0, i1) see.
  JF_HD Interval common(int32_t i0, int32_t i1) const {
    if (i1 <= i0 || i1 > q_len) return {0, 0};
    return {first_key(i1 - 1), last_key(i0)};
  }

  // The rows that see at least one of the keys [j0, j1).
  JF_HD Interval queries(int32_t j0, int32_t j1) const {
    if (j1 > k_len) j1 = k_len;
    if (j1 <= j0) return {0, 0};
    return {clamp(j0 - shift - right, q_len), clamp(j1 - shift + left, q_len)};
  }

  // The rows that see all of the keys [j0, j1).
  JF_HD Interval common_queries(int32_t j0, int32_t j1) const {
    if (j1 <= j0 || j1 > k_len) return {0, 0};
    return {clamp(j1 - 1 - shift - right, q_len), clamp(j0 + 1 - shift + left, q_len)};
  }

  JF_HD TileClass classify(int32_t i0, int32_t i1, int32_t j0, int32_t j1) const {
    if (intersect(rows(i0, i1), {j0, j1}).empty()) return TileClass::kSkip;
    const Interval all = common(i0, i1);
    return all.lo <= j0 && j1 <= all.hi ? TileClass::kFull : TileClass::kPartial;
  }

 private:
  JF_HD static int32_t clamp(int64_t x, int32_t limit) {
    return x < 0 ? 0 : x > limit ? limit : static_cast<int32_t>(x);
  }
};

// How far `position` shifts the diagonal of every row. `position` says where the call's first query and first
// key lie in the larger sequence; indices of rows and keys count from these first ones.
JF_HD int64_t diagonal_shift(const View& position, int64_t leading_offset) {
  const int32_t* first = position.as<const int32_t>() + leading_offset;
  return int64_t{first[0]} - first[position.column];
}

// Whether operands move the band. This reads the spec, which every kernel loads at its start anyway.
JF_HD bool has_moved_band(const Problem& p) { return __builtin_expect(p.spec.moves_band(), false); }

// Moves the band of a batch entry or sequence by the operands. element(view): the element of that entry.
template <class Shift, class Element>
JF_HD void move_band(Band& band, const Problem& p, Shift shift, Element element) {
  if (p.position) band.shift += shift(p.position);
  if (p.window_offset) band.shift += element(p.window_offset);
  if (p.window_left) band.left = element(p.window_left);
  if (p.window_right) band.right = element(p.window_right);
}

JF_HD Band make_band(const AttentionSpec& spec, const Sequence& s) {
  constexpr int64_t kUnbounded = int64_t{1} << 40;
  const int64_t shift = spec.align == Align::kBottomRight ? int64_t{s.k_len} - s.q_len : 0;
  return {s.q_len, s.k_len, shift, spec.left < 0 ? kUnbounded : spec.left,
          spec.right < 0 ? kUnbounded : spec.right};
}

// Out of line: few calls move the band, and this code would lengthen the start of every kernel.
JF_HD_NOINLINE int64_t leading_shift(const Problem& p, const View& position, int64_t leading) {
  return diagonal_shift(position, position.leading_offset(p.leading, leading));
}
JF_HD_NOINLINE int32_t leading_element(const Problem& p, const View& view, int64_t leading, int32_t index) {
  return view.as<const int32_t>()[view.leading_offset(p.leading, leading) + index * view.batch];
}

JF_HD Band make_band(const Problem& p, int64_t leading, const Sequence& s) {
  Band band = make_band(p.spec, s);
  if (has_moved_band(p) && s.index >= 0)
    move_band(
        band, p, [&](const View& position) { return leading_shift(p, position, leading); },
        [&](const View& view) { return leading_element(p, view, leading, s.index); });
  return band;
}

}  // namespace jax_flash
