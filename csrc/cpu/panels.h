// Which panels of a tile of keys the rows of a block see by a mask and a block mask. Panels that no row sees
// are neither multiplied nor exponentiated.
#pragma once

#include "isa.h"
// isa.h goes first: it makes the core force-inlined.
#include "scores.h"

namespace jax_flash::JF_ISA {

static_assert(kTileN / kPanel <= 64);

// The next run of panels at or after column `from` whose bits are set in `seen` (bit c / kPanel belongs to
// column c). Empty, at panels.hi, if there is none.
JF_INLINE Columns next_run(Columns panels, uint64_t seen, int32_t from) {
  if (seen == kAllPanels) return {from, panels.hi};
  if (seen == 0) return {panels.hi, panels.hi};
  const auto is_seen = [&](int32_t c) { return (seen >> (c / kPanel) & 1) != 0; };
  while (from < panels.hi && !is_seen(from)) from += kPanel;
  int32_t end = from;
  while (end < panels.hi && is_seen(end)) end += kPanel;
  return {from, end};
}

// Calls use(run) for each run of panels.
template <class Use>
JF_INLINE void for_each_run(Columns panels, uint64_t seen, Use use) {
  for (Columns run = next_run(panels, seen, panels.lo); !run.empty(); run = next_run(panels, seen, run.hi)) {
    use(run);
  }
}

// One bit for each panel of columns [lo, hi).
JF_INLINE uint64_t panel_bits(int32_t lo, int32_t hi) {
  if (hi <= lo) return 0;
  const int32_t first = lo / kPanel, count = (hi + kPanel - 1) / kPanel - first;
  return (count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1) << first;
}

// One bit per panel of a tile: set in `some` if at least one row sees a key of the panel, set in `all` if
// every row sees all keys of the panel that the tile has.
struct SeenPanels {
  uint64_t some = kAllPanels, all = kAllPanels;

  // Panels that some row sees, and of which some row does not see every key.
  JF_HD uint64_t mixed() const { return some & ~all; }

  JF_HD bool hides_some(Columns columns) const { return (panel_bits(columns.lo, columns.hi) & ~all) != 0; }

  // The smallest interval of `columns` that holds all columns whose panel some row sees.
  JF_HD Columns hull(Columns columns) const {
    const uint64_t left = some & panel_bits(columns.lo, columns.hi);
    if (left == 0) return {0, 0};
    return {max(columns.lo, __builtin_ctzll(left) * kPanel),
            min(columns.hi, (64 - __builtin_clzll(left)) * kPanel)};
  }
};

typedef uint8_t PanelBytes __attribute__((vector_size(kPanel), may_alias));
typedef PanelBytes PanelBytesUnaligned __attribute__((aligned(1)));

JF_INLINE bool any_byte(PanelBytes x) {
  uint64_t words[kPanel / 8], any = 0;
  __builtin_memcpy(words, &x, sizeof(x));
  for (uint64_t word : words) any |= word;
  return any != 0;
}

// Collects rows of a mask over columns [lo, hi), at most one tile.
class MaskPanels {
 public:
  explicit MaskPanels(Columns columns) : columns_(columns), first_(columns.lo / kPanel) {
    end_ = (columns.hi + kPanel - 1) / kPanel;
    for (int32_t i = first_; i < end_; ++i) some_[i] = hidden_[i] = PanelBytes{};
  }

  // `row`: the address of column 0.
  void add(const uint8_t* row) {
    for (int32_t i = first_; i < end_; ++i) {
      const int32_t c = i * kPanel;
      if (c >= columns_.lo && c + kPanel <= columns_.hi) {
        const PanelBytes seen = *reinterpret_cast<const PanelBytesUnaligned*>(row + c);
        note(i, seen, seen);
        continue;
      }
      const int32_t lo = max(c, columns_.lo), hi = min(c + kPanel, columns_.hi);
      PanelBytes seen{}, others = PanelBytes{} + 1;
      __builtin_memcpy(reinterpret_cast<char*>(&seen) + lo - c, row + lo, hi - lo);
      __builtin_memcpy(reinterpret_cast<char*>(&others) + lo - c, row + lo, hi - lo);
      note(i, seen, others);
    }
  }

  SeenPanels panels() const {
    SeenPanels found{0, 0};
    for (int32_t i = first_; i < end_; ++i) {
      if (any_byte(some_[i])) found.some |= uint64_t{1} << i;
      if (!any_byte(hidden_[i])) found.all |= uint64_t{1} << i;
    }
    return found;
  }

 private:
  JF_HD void note(int32_t i, PanelBytes seen, PanelBytes or_outside) {
    some_[i] |= seen;
    hidden_[i] |= reinterpret_cast<PanelBytes>(or_outside == 0);
  }

  Columns columns_;
  int32_t first_, end_;
  PanelBytes some_[kTileN / kPanel], hidden_[kTileN / kPanel];
};

// The panels that a boolean mask leaves to rows within the sequence's length. It hides no column before its
// own.
static SeenPanels panels_of_mask(const MaskOfHeads& mask, QueryRange rows, Columns columns, int32_t j0) {
  const int32_t heads = mask.head != 0 ? rows.heads : 1, end = mask.row != 0 ? rows.end : rows.begin + 1;
  const uint64_t bits = panel_bits(columns.lo, columns.hi);
  const Columns own{max(columns.lo, mask.first - j0), columns.hi};
  if (own.empty()) return {bits, bits};
  const uint8_t* const first = mask.at(0, rows.begin, j0);
  if (mask.column == 0) {
    SeenPanels found{0, bits};
    for (int32_t h = 0; h < heads; ++h) {
      for (int32_t i = rows.begin; i < end; ++i) {
        if (first[h * mask.head + (i - rows.begin) * mask.row]) {
          found.some = bits;
        } else {
          found.all = 0;
        }
      }
    }
    return found;
  }
  MaskPanels masked(own);
  for (int32_t h = 0; h < heads; ++h) {
    for (int32_t i = rows.begin; i < end; ++i)
      masked.add(first + h * mask.head + (i - rows.begin) * mask.row);
  }
  SeenPanels found = masked.panels();
  found.some |= panel_bits(columns.lo, own.lo), found.all |= bits & ~panel_bits(own.lo, own.hi);
  return found;
}

// The panels that blocks of single keys leave to such rows.
static SeenPanels panels_of_keys(const BlockMask& blocks, QueryRange rows, Columns columns, int32_t j0) {
  const bool each_row = blocks.block_rows == 1;
  const int64_t row = each_row ? blocks.row : 0;
  const Columns own{columns.lo, min(columns.hi, blocks.columns - blocks.first_key - j0)};
  QueryRange known = rows;
  if (each_row) known.end = min(rows.end, blocks.rows - blocks.first_row);
  if (own.empty() || known.end <= known.begin) return {0, 0};
  const uint8_t* const first = blocks.seen + blocks.first_row * row + blocks.first_key;
  SeenPanels found = panels_of_mask({{first, row, 0}, blocks.head}, known, own, j0);
  found.all &= known.end < rows.end ? 0 : ~panel_bits(own.hi, columns.hi);
  return found;
}

// The panels that a block mask leaves to such rows.
static SeenPanels panels_of_blocks(const BlockMask& blocks, QueryRange rows, Columns columns, int32_t j0) {
  if (blocks.block_keys == 1) return panels_of_keys(blocks, rows, columns, j0);
  SeenPanels found{0, panel_bits(columns.lo, columns.hi)};
  const int32_t heads = blocks.head != 0 ? rows.heads : 1, m = blocks.block_rows, n = blocks.block_keys;
  j0 += blocks.first_key, rows.begin += blocks.first_row, rows.end += blocks.first_row;
  for (int32_t h = 0; h < heads; ++h) {
    for (int32_t at = rows.begin / m; at * m < rows.end; ++at) {
      for (int32_t k = (j0 + columns.lo) / n; k * n < j0 + columns.hi; ++k) {
        const uint64_t bits = panel_bits(max(k * n - j0, columns.lo), min((k + 1) * n - j0, columns.hi));
        if (blocks.sees_block(h, at, k)) {
          found.some |= bits;
        } else {
          found.all &= ~bits;
        }
      }
    }
  }
  return found;
}

// The panels that both masks leave to rows of a head. Column 0 of the tile is key j0.
JF_INLINE SeenPanels seen_panels(const Head& head, QueryRange rows, Columns columns, int32_t j0) {
  SeenPanels found;
  rows.end = min(rows.end, head.band.q_len);
  if (!head.hides_panels || columns.empty() || rows.end <= rows.begin) return found;
  if (head.mask) found = panels_of_mask(head.mask, rows, columns, j0);
  if (head.blocks) {
    const SeenPanels blocks = panels_of_blocks(head.blocks, rows, columns, j0);
    found = {found.some & blocks.some, found.all & blocks.all};
  }
  return found;
}

}  // namespace jax_flash::JF_ISA
