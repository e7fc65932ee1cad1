// A call on pools of more than 2^31 elements.
#pragma once

#include <cmath>
#include <string>

#include "random_case.h"

namespace jax_flash {

// Appends one token to the last page of a pool of more than 2^31 elements, and attends to it. Only the pages
// that are touched take memory. Returns false if nothing runs such a call.
inline bool use_a_huge_pool() {
  current_call = "huge pool";
  backend::aim(3, Loader::kPaged, {Pass::kForward});  // turn 3 targets no kernel, so any kernel may run
  constexpr int32_t kPages = (1 << 20) + 3, kSlots = 16, kHeads = 3, kWidth = 64;
  AppendProblem a{};
  a.spec.page_layout = PageLayout::kNhd;
  a.dtype = DType::kF32;
  a.pool_dtype = DType::kF8E4M3;
  a.batch = a.table = a.q_rows = 1;
  a.kv_heads = kHeads;
  a.head_dim = a.value_dim = kWidth;
  a.page_size = kSlots;
  a.pages = kPages;
  const Guarded k(size_t{kPages} * kSlots * kHeads * kWidth, true), v(k.bytes(), true);
  for (View* pool : {&a.k_pages, &a.v_pages}) {
    *pool = {.data = pool == &a.k_pages ? k.data() : v.data(),
             .batch = kSlots * kHeads * kWidth,
             .head = kWidth,
             .row = kHeads * kWidth,
             .column = 1};
  }
  const Guarded token(kHeads * kWidth * 4, true), out(token.bytes(), true), lse(kHeads * 4, true);
  const Guarded table(4, true), before(4, true), after(4, true);
  for (int i = 0; i < kHeads * kWidth; ++i)
    reinterpret_cast<float*>(token.data())[i] = static_cast<float>(i % 7) - 3.0f;
  *reinterpret_cast<int32_t*>(table.data()) = kPages - 1;
  *reinterpret_cast<int32_t*>(before.data()) = 0;
  *reinterpret_cast<int32_t*>(after.data()) = 1;
  const View row{.data = token.data(), .head = kWidth, .row = kHeads * kWidth, .column = 1};
  a.key = a.value = row;
  a.block_tables = {.data = table.data(), .batch = 1, .column = 1};
  a.kv_lengths = {.data = before.data(), .batch = 1};
  if (!backend::append(a, ThreadPool{})) return false;

  Problem p{};
  p.spec.layout = Layout::kPaged;
  p.spec.left = p.spec.right = kUnlimited;
  p.spec.scale = 1.0f;
  p.dtype = DType::kF32;
  p.kv_dtype = DType::kF8E4M3;
  p.batch = p.q_rows = p.table = 1;
  p.heads = p.kv_heads = kHeads;
  p.head_dim = p.value_dim = kWidth;
  p.k_rows = p.page_size = kSlots;
  p.pages = kPages;
  p.query = p.out = row;
  p.out.data = out.data();
  p.lse = {.data = lse.data(), .head = 1, .row = 1};
  p.key = a.k_pages;
  p.value = a.v_pages;
  p.block_tables = a.block_tables;
  p.kv_lengths = {.data = after.data(), .batch = 1};
  if (!backend::run(Pass::kForward, p, ThreadPool{})) return false;
  for (size_t i = 0; i < out.bytes(); i += 4) {
    const float x = value_of(DType::kF32, out.data() + i), y = value_of(DType::kF32, token.data() + i);
    if (!(std::fabs(x - y) <= 1e-5f + 1e-5f * std::fabs(y))) {
      fail("attention to the only key is " + std::to_string(x) + ", not its value, " + std::to_string(y));
    }
  }
  return true;
}

}  // namespace jax_flash
