// The place of a sequence's keys in a pool of pages: position → (page, slot).
#pragma once

#include <cstdint>
#include <limits>

#include "spec.h"
#include "views.h"

namespace jax_flash {

// Keys that a row of a block table can hold, limited to int32, the type of positions and lengths.
JF_HD int32_t table_capacity(int64_t entries, int64_t page_size) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  if (entries <= 0 || page_size <= 0) return 0;
  return static_cast<int32_t>(entries > kMost / page_size ? kMost : entries * page_size);
}

// PageTable::find returns these instead of a page, where the table's entry lies outside the pool or there is
// no such key.
inline constexpr int32_t kMissingPage = -1, kNoPage = -2;

struct PageSlot {
  int32_t page, slot;
};

// One sequence's row of the block tables. Positions must be below table_capacity.
struct PageTable {
  const int32_t* entries;
  int32_t page_size;
  int32_t pages;  // pages of the pool

  JF_HD PageSlot at(int32_t position) const { return {entries[position / page_size], position % page_size}; }

  // Tables may hold any value; only pages for which this is true are read or written.
  JF_HD bool in_pool(int32_t page) const { return 0 <= page && page < pages; }

  // at(position), or {kMissingPage, 0} where the table's entry lies outside the pool.
  JF_HD PageSlot lookup(int32_t position) const {
    const PageSlot found = at(position);
    return in_pool(found.page) ? found : PageSlot{kMissingPage, 0};
  }

  // lookup() for the keys [begin, end), which lie within the table's capacity, and {kNoPage, 0} for any other
  // position.
  JF_HD PageSlot find(int64_t position, int64_t begin, int64_t end) const {
    if (position < begin || position >= end) return {kNoPage, 0};
    return lookup(static_cast<int32_t>(position));
  }
};

JF_HD PageTable page_table(const View& tables, const Leading& dims, int64_t leading, int32_t index,
                           int32_t page_size, int32_t pages) {
  const int64_t offset = tables.leading_offset(dims, leading) + index * tables.batch;
  return {tables.as<const int32_t>() + offset, page_size, pages};
}

}  // namespace jax_flash
