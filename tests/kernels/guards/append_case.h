// A random call of append_kv. It writes the slots that tables, lengths and offsets name, and nothing else.
#pragma once

#include <map>
#include <string>

#include "pool_case.h"

namespace jax_flash {

class AppendCase : PoolCase {
 public:
  explicit AppendCase(uint64_t seed) : PoolCase(seed) {
    names_ = names_of(p_);
    AppendSpec& s = p_.spec;
    s.page_layout = layout_;
    s.interleaved = chance(0.5);
    const auto add = [&](AppendOperand operand) { s.operands |= 1 << static_cast<int32_t>(operand); };
    if (chance(0.5)) add(AppendOperand::kCuSeqlens);
    const bool many_bytes = chance(0.3);  // a token has enough bytes for bulk copies
    if (many_bytes) {
      kv_heads_ = 3;
      head_dim_ = backend::width(static_cast<int32_t>(integer(180, 256)));
      value_dim_ = chance(0.8) ? head_dim_ : value_dim_;
    }
    p_.dtype = dtype_;
    p_.pool_dtype = pool_dtype_;
    p_.leading = leading_;
    p_.batch = batch_;
    p_.kv_heads = kv_heads_;
    p_.head_dim = head_dim_;
    p_.value_dim = value_dim_;
    p_.q_rows = static_cast<int32_t>(integer(0, many_bytes && chance(0.5) ? 60 : 12));
    p_.page_size = page_size_;
    p_.pages = pages_;
    p_.table = table_;
    make_tables(p_.block_tables, p_.kv_lengths);
    make_tokens(p_.key, p_.packed(), p_.q_rows, kv_heads_, head_dim_);
    make_tokens(p_.value, p_.packed(), p_.q_rows, kv_heads_, value_dim_);
    if (p_.packed())
      make_index(p_.cu_seqlens, {{batch_ + 1, &View::batch}}, p_.q_rows, one_of({0.0, 0.5}), true);
    if (chance(0.5)) {
      add(AppendOperand::kCos), add(AppendOperand::kSin);
      p_.positions = static_cast<int32_t>(integer(1, 9));
      p_.rotated = static_cast<int32_t>(integer(0, head_dim_ / 2));
      for (View* view : {&p_.cos, &p_.sin})
        fill(make(*view, 4, {{p_.positions, &View::row}, {p_.rotated, &View::column}}, true), DType::kF32);
    }
    if (pool_dtype_ != dtype_ && chance(0.7)) {
      add(AppendOperand::kKScale), add(AppendOperand::kVScale);
      make_scales(p_.k_scale, chance(0.5)), make_scales(p_.v_scale, chance(0.5));
    }
    make_pool(p_.k_pages, head_dim_, false);
    make_pool(p_.v_pages, value_dim_, false);
  }

  std::string text() const {
    char line[300];
    std::snprintf(
        line, sizeof line,
        "append layout=%d dtype=%d/%d leading=%d batch=%d heads=%d d=%d dv=%d rows=%d packed=%d pages=%d of "
        "%d, table=%d rotated=%d operands=%#x",
        static_cast<int>(layout_), static_cast<int>(dtype_), static_cast<int>(pool_dtype_), leading_.rank,
        batch_, kv_heads_, head_dim_, value_dim_, p_.q_rows, p_.packed(), pages_, page_size_, table_,
        p_.rotated, p_.spec.operands);
    return line;
  }

  void run() {
    const Guarded &k = memory_of(&p_.k_pages), &v = memory_of(&p_.v_pages);
    k.poison(), v.poison();
    if (!backend::append(p_, ThreadPool{})) return;
    check(p_.k_pages, p_.key, head_dim_, p_.rotated == 0);
    check(p_.v_pages, p_.value, value_dim_, true);
    const std::string first(k.data(), k.bytes()), first_v(v.data(), v.bytes());
    k.poison(), v.poison();
    with_threads([&](const ThreadPool& pool) { backend::append(p_, pool); });
    if (std::memcmp(first.data(), k.data(), k.bytes()) || std::memcmp(first_v.data(), v.data(), v.bytes()))
      fail("the pools depend on the threads or on the run");
  }

 private:
  // A slot holds the last token written to it; every other slot is unchanged.
  void check(const View& pool, const View& rows, int32_t width, bool as_given) {
    const auto size = static_cast<int64_t>(size_of(pool_dtype_));
    for (int64_t l = 0; l < leading_.count(); ++l) {
      std::map<std::pair<int64_t, int64_t>, int64_t> last;  // (page, slot) -> offset of the row, at head 0
      for (int32_t z = 0; z < batch_; ++z) {
        const auto [begin, end] =
            p_.packed() ? rows_of(p_.cu_seqlens, l, z, p_.q_rows) : std::pair<int64_t, int64_t>{0, p_.q_rows};
        int64_t position = clamp(index(p_.kv_lengths, l, z), capacity());
        for (int64_t t = begin; t < end && position < capacity(); ++t, ++position) {
          const int64_t page = index(p_.block_tables, l, z, position / page_size_);
          if (page < 0 || page >= pages_) continue;
          last[{page, position % page_size_}] =
              rows.leading_offset(leading_, l) + z * rows.batch + t * rows.row;
        }
      }
      for (int64_t page = 0; page < pages_; ++page)
        for (int64_t slot = 0; slot < page_size_; ++slot)
          for (int32_t h = 0; h < kv_heads_; ++h) {
            const char* at = pool.as<const char>() +
                             (pool.leading_offset(leading_, l) + pool.offset(page, h, slot)) * size;
            const auto found = last.find({page, slot});
            if (found == last.end()) {
              for (int64_t i = 0; i < width * size; ++i)
                if (at[i] != '\xFF') fail("a slot that no token goes to was written");
            } else if (as_given && pool_dtype_ == dtype_) {
              const char* row = rows.as<const char>() + (found->second + h * rows.head) * size;
              if (std::memcmp(at, row, width * size)) fail("a slot holds something else than its token");
            } else {
              for (int32_t c = 0; c < width; ++c)
                if (!std::isfinite(value_of(pool_dtype_, at + c * size)))
                  fail("a slot was not written whole");
            }
          }
    }
  }

  AppendProblem p_{};
};

}  // namespace jax_flash
