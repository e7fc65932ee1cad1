// Sizes, pools and tables shared by the random calls of paged attention and of append_kv.
#pragma once

#include <utility>
#include <vector>

#include "random_case.h"

namespace jax_flash {

// Sizes that both calls have, and their index operands.
class PoolCase : protected RandomCase {
 protected:
  explicit PoolCase(uint64_t seed) : RandomCase(seed) {
    leading_ = random_leading();
    layout_ = one_of({PageLayout::kNhd, PageLayout::kHnd});
    dtype_ = one_of({DType::kF16, DType::kBF16, DType::kF32});
    pool_dtype_ = chance(0.3) ? float8() : dtype_;
    batch_ = static_cast<int32_t>(integer(chance(0.05) ? 0 : 1, usual_or(4, 2)));
    kv_heads_ = static_cast<int32_t>(integer(1, usual_or(3, 1)));
    page_size_ = static_cast<int32_t>(chance(0.2) ? integer(60, 300) : integer(1, 9));
    table_ = static_cast<int32_t>(integer(chance(0.1) ? 0 : 1, 6));
    pages_ = static_cast<int32_t>(integer(chance(0.1) ? 0 : 1, 8));
    head_dim_ = width();
    value_dim_ = chance(0.5) ? head_dim_ : width();
  }

  DType float8() { return one_of({DType::kF8E4M3, DType::kF8E5M2}); }
  int32_t width() {
    return backend::width(static_cast<int32_t>(chance(0.1) ? integer(1, kMaxHeadDim) : integer(1, 40)));
  }
  int32_t capacity() const { return table_ * page_size_; }

  Guarded& make(View& view, size_t element, std::vector<Dim> dims, bool broadcast) {
    return RandomCase::make(view, leading_, element, std::move(dims), broadcast);
  }

  Guarded& make_pool(View& view, int32_t width, bool broadcast) {
    const Dim slot{page_size_, &View::row}, head{kv_heads_, &View::head};
    const bool nhd = layout_ == PageLayout::kNhd;
    return make(view, size_of(pool_dtype_),
                {{pages_, &View::batch}, nhd ? slot : head, nhd ? head : slot, {width, &View::column}},
                broadcast);
  }

  void make_tokens(View& view, bool packed, int32_t rows, int32_t heads, int32_t width) {
    std::vector<Dim> dims{{rows, &View::row}, {heads, &View::head}, {width, &View::column}};
    if (!packed) dims.insert(dims.begin(), {batch_, &View::batch});
    Guarded& m = make(view, size_of(dtype_), dims, false);
    fill(m, dtype_);
    m.make_read_only();
  }

  // By KV head, or by page and KV head.
  void make_scales(View& view, bool by_page) {
    std::vector<Dim> dims{{kv_heads_, &View::head}};
    if (by_page && pages_ > 1) dims.insert(dims.begin(), {pages_, &View::batch});
    Guarded& m = make(view, 4, dims, true);
    for (size_t i = 0; i < m.bytes(); i += 4)
      set_value(DType::kF32, m.data() + i, 0.5f + std::fabs(normal()));
    m.make_read_only();
  }

  // Values in [0, limit) or [0, limit]; a few of them, or most with `wild`, are arbitrary.
  void make_index(View& view, std::vector<Dim> dims, int32_t limit, double wild, bool sorted = false) {
    Guarded& m = make(view, 4, dims, true);
    int32_t* x = reinterpret_cast<int32_t*>(m.data());
    const auto count = static_cast<size_t>(dims.back().size);
    for (size_t i = 0; i < m.bytes() / 4; ++i) {
      x[i] = chance(wild) ? garbage(limit)
             : sorted     ? static_cast<int32_t>(limit * (i % count) / count)
                          : static_cast<int32_t>(integer(0, std::max(limit, 0)));
    }
    m.make_read_only();
  }

  void make_tables(View& tables, View& lengths) {
    const double wild = one_of({0.0, 0.05, 0.5});
    make_index(tables, {{batch_, &View::batch}, {table_, &View::column}}, std::max(pages_ - 1, 0), wild);
    make_index(lengths, {{batch_, &View::batch}}, capacity(), wild);
  }

  int64_t index(const View& view, int64_t leading, int64_t i, int64_t j = 0) const {
    const int64_t at = view.leading_offset(leading_, leading) + i * view.batch + j * view.column;
    return view.as<const int32_t>()[at];
  }

  // Rows [first, second) of sequence z in a packed operand.
  std::pair<int64_t, int64_t> rows_of(const View& starts, int64_t leading, int32_t z, int32_t rows) const {
    int64_t begin = 0, end = 0;
    for (int32_t i = 0; i <= z + 1; ++i) {
      begin = end;
      end = std::max(end, clamp(index(starts, leading, i), rows));
    }
    return {begin, end};
  }

  Leading leading_;
  PageLayout layout_;
  DType dtype_, pool_dtype_;
  int32_t batch_, kv_heads_, page_size_, table_, pages_, head_dim_, value_dim_;
};

}  // namespace jax_flash
