// Kernel parameters of append_kv. A kernel fetches its parameters from memory when it starts, which takes
// much of a short call's time. So there are few parameters, and divisions are replaced by products.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "core/divisor.h"
#include "core/paging.h"
#include "core/problem.h"
#include "core/sequence.h"

namespace jax_flash::append {

// A View with at most one leading dimension. Strides are in elements.
struct AppendView {
  void* data = nullptr;
  int64_t leading = 0, batch = 0, head = 0, row = 0;

  JF_HD explicit operator bool() const { return data != nullptr; }
  // Element (leading entry, b, h, i).
  template <class T>
  JF_HD T* at(int32_t entry, int64_t b, int32_t h, int64_t i) const {
    return static_cast<T*>(data) + (entry * leading + b * batch + h * head + i * row);
  }
};

// New keys or values [token, h], and the pool that they are written to.
struct AppendStream {
  AppendView rows, pool, scale;
  int32_t width;  // head dim
};

struct AppendCall {
  AppendStream key, value;
  AppendView block_tables, kv_lengths, cu_seqlens, cos, sin;
  Divisor rows;  // new tokens of a sequence, or of all sequences together if they are packed
  Divisor runs;  // upper bound of the runs of a sequence, if all sequences have the same number of tokens
  Divisor page_size;
  int32_t sequences, tokens, heads;
  int32_t earlier;  // number of packed sequences that earlier launches handle
  int32_t capacity, pages, positions, rotated;
  bool packed, interleaved;
  DType stored;  // dtype of the pools
};

// The most packed sequences per launch; their starts take 64 KB of shared memory.
inline constexpr int32_t kMostSequences = 8191;

// The part of the call with sequences [first, first + kMostSequences) of the outer leading entry `outer`. The
// last leading dimension is a dimension of the kernel's grid.
inline AppendCall make_call(const AppendProblem& p, int64_t outer, int32_t first) {
  const int last = p.leading.rank - 1;
  const int64_t inner = last < 0 ? 1 : p.leading.size[last];
  const auto view = [&](const View& v, DType dtype, int64_t from = 0) {
    if (!v) return AppendView{};
    const int64_t offset = (v.leading_offset(p.leading, outer * inner) + from) * size_of(dtype);
    return AppendView{static_cast<uint8_t*>(v.data) + offset, last < 0 ? 0 : v.leading[last], v.batch, v.head,
                      v.row};
  };
  const auto words = [&](const View& v) { return view(v, DType::kF32); };
  const auto by_sequence = [&](const View& v) { return view(v, DType::kF32, first * v.batch); };
  AppendCall call{};
  call.key = {view(p.key, p.dtype), view(p.k_pages, p.pool_dtype), words(p.k_scale), p.head_dim};
  call.value = {view(p.value, p.dtype), view(p.v_pages, p.pool_dtype), words(p.v_scale), p.value_dim};
  call.block_tables = by_sequence(p.block_tables), call.kv_lengths = by_sequence(p.kv_lengths);
  call.cu_seqlens = by_sequence(p.cu_seqlens), call.cos = words(p.cos), call.sin = words(p.sin);
  call.rows = Divisor(p.q_rows), call.page_size = Divisor(p.page_size);
  call.runs = Divisor((int64_t{p.q_rows} + p.page_size - 2) / p.page_size + 1);
  call.packed = p.packed();
  call.sequences = call.packed ? std::min(p.batch - first, kMostSequences) : p.batch;
  call.earlier = first;
  call.tokens = p.q_rows * (call.packed ? 1 : p.batch), call.heads = p.kv_heads;
  call.capacity = table_capacity(p.table, p.page_size), call.pages = p.pages;
  call.positions = p.positions, call.rotated = p.rotated;
  call.interleaved = p.spec.interleaved, call.stored = p.pool_dtype;
  return call;
}

// Calls run(call, entries) for each launch of a call, in order. `entries`: size of the last leading
// dimension.
template <class Run>
cudaError_t for_each_launch(const AppendProblem& p, Run run) {
  const int64_t entries = p.leading.rank > 0 ? p.leading.size[p.leading.rank - 1] : 1;
  for (int64_t outer = 0; outer * entries < p.leading.count(); ++outer) {
    for (int32_t first = 0; first < p.batch; first += p.packed() ? kMostSequences : p.batch) {
      const cudaError_t e = run(make_call(p, outer, first), entries);
      if (e != cudaSuccess) return e;
    }
  }
  return cudaSuccess;
}

}  // namespace jax_flash::append
