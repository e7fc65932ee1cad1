// The rows of a per-token operand, contiguous or in pages.
#pragma once

#include "isa.h"
// isa.h goes first: it makes the core force-inlined.
#include "../core/paging.h"
#include "convert.h"

namespace jax_flash::JF_ISA {

// Rows of a per-token operand at one head. Without a page table, position j of the sequence is at base + j *
// stride bytes, else in its page's slot. Elements are multiplied by `factor` or, if page_factors is set, by
// the factor of their page. Rows of a page outside the pool read as `missing`.
struct Rows {
  char* base;
  int64_t stride;
  DType dtype;
  int32_t width;
  float factor = 1.0f, missing = 0.0f;
  PageTable table = {};  // no pages if `entries` is null
  int64_t page_stride = 0;
  const float* page_factors = nullptr;  // factor of page 0
  int64_t page_factor_stride = 0;
  const float* row_factors = nullptr;  // factors of the rows that are read next (with_row_factors())

  JF_HD char* at(int32_t j) const { return base + j * stride; }

  // Sets at[0, n) to the addresses of rows [begin, begin + n), null for rows on a page outside the pool.
  JF_HD void addresses(int32_t begin, int32_t n, const char** at) const {
    if (!table.entries) {
      for (int32_t r = 0; r < n; ++r) at[r] = base + (begin + r) * stride;
      return;
    }
    for_each_page(begin, n, [&](int32_t r, int32_t end, PageSlot first) {
      const bool found = table.in_pool(first.page);
      const char* row = base + (found ? first.page * page_stride + first.slot * stride : 0);
      for (; r < end; ++r, row += stride) at[r] = found ? row : nullptr;
    });
  }

  // Sets to[0, n) to the factors of the pages of rows [begin, begin + n).
  JF_HD void factors(int32_t begin, int32_t n, float* to) const {
    for_each_page(begin, n, [&](int32_t r, int32_t end, PageSlot first) {
      const float x = table.in_pool(first.page) ? page_factors[first.page * page_factor_stride] : 1.0f;
      for (; r < end; ++r) to[r] = x;
    });
  }

  // The rows [begin, begin + n) with their factors, which it writes to `memory`.
  JF_HD Rows with_row_factors(int32_t begin, int32_t n, float* memory) const {
    Rows rows = *this;
    if (page_factors) factors(begin, n, memory), rows.row_factors = memory;
    return rows;
  }

 private:
  // Calls f(r, end, slot) for each page of rows [begin, begin + n): rows [r, end) of them are in its slots
  // from `slot` on.
  template <class F>
  JF_HD void for_each_page(int32_t begin, int32_t n, F f) const {
    for (int32_t r = 0; r < n;) {
      const PageSlot first = table.at(begin + r);
      const int32_t end = r + min(n - r, table.page_size - first.slot);
      f(r, end, first);
      r = end;
    }
  }
};

// The padded width of a row-major tile.
JF_INLINE int32_t padded(int32_t width) { return round_up(width, kPanel); }

JF_INLINE void fill(float* to, int32_t n, float x) {
  for (int32_t c = 0; c < n; c += kLanes) store(to + c, broadcast(x));
}

}  // namespace jax_flash::JF_ISA
