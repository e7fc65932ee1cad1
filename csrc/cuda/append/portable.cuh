// append_kv on every card: writes new keys and values into the slots of a page pool. Keys are rotated, and
// keys and values are quantised if the pool is float8 (in dynamic.cuh, with scales that follow the pages).
//
// A block handles a range of tokens (own.cuh), and each of its threads handles words of a token.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/append/dynamic.cuh"
#include "cuda/append/own.cuh"
#include "cuda/append/tokens.cuh"
#include "cuda/append/words.cuh"
#include "cuda/launch.h"
#include "cuda/ptx/shared.cuh"
#include "cuda/registry.h"

namespace jax_flash::append::inline JF_ARCH_NAMESPACE {

// The division of a call: a block handles `tokens` tokens of one leading entry, and `units` units of each
// token, the first of which is slice · units.
struct Parts {
  Divisor chunks, slices, units;
  int32_t tokens;
};

template <class T, class Pool, int kWord, int kBlocks>
__global__ void __launch_bounds__(kThreads, kBlocks)
    append_tokens(const __grid_constant__ AppendCall call, const __grid_constant__ Units units,
                  const __grid_constant__ Parts parts) {
  __shared__ Shared shared;
  const int32_t part = parts.slices.quotient(static_cast<int32_t>(blockIdx.x));
  const int32_t slice = static_cast<int32_t>(blockIdx.x) - part * parts.slices.value;
  const int32_t entry = parts.chunks.quotient(part);
  const int32_t first = (part - entry * parts.chunks.value) * parts.tokens;
  const int32_t count = min(parts.tokens, call.tokens - first);
  const int32_t first_unit = slice * parts.units.value;
  const int32_t items = count * parts.units.value;  // items past the last unit do nothing
  const auto used = [&](int32_t item) {
    return item < items && first_unit + parts.units.remainder(item) < units.all;
  };
  int32_t item = static_cast<int32_t>(threadIdx.x), token = 0;
  Unit<T, Pool, kWord> unit;
  const auto load = [&] {
    token = parts.units.quotient(item);
    unit = Unit<T, Pool, kWord>(call, units, first_unit + item - token * parts.units.value);
    unit.load(call, entry, first + token);
  };

  // Loads that do not depend on the slots are issued before the slots are looked up.
  const bool early = !call.packed && call.rotated > 0;
  if (used(item)) {
    load();
    if (early) {
      const int32_t sequence = call.rows.quotient(first + token);
      const int64_t number = first + token - sequence * call.rows.value;
      const int64_t position = length_before(call, entry, sequence) + number;
      unit.load_angles(call, entry, static_cast<int32_t>(min(position, int64_t{call.capacity})));
    }
  }
  auto* const memory = reinterpret_cast<int32_t*>(ptx::dynamic_shared());
  const Starts starts{memory, memory + call.sequences + 1};
  if (call.packed) find_first_rows(call, entry, starts, shared.scan);
  if (call.tokens <= kThreads) {
    find_own_of_few(call, entry, {first, count, false}, starts, shared);
  } else {
    if (call.packed) find_first_runs(call, starts, shared.scan);
    find_own(call, entry, {first, count, count > kFew}, starts, shared);
  }
  for (bool is_first = true; item < items; item += kThreads, is_first = false) {
    if (!used(item)) continue;
    if (!is_first) load();
    const Slot to = shared.own[token];
    if (to.page == kNowhere || shared.overwritten[token]) continue;
    if (!(is_first && early)) unit.load_angles(call, entry, to.position);
    unit.rotate(call);
    unit.store(call, entry, to, sizeof(Pool) == 1 ? unit.scale_of(call, entry, to.page) : 1);
  }
}

// Each block has at most kThreads units of one token if these blocks fit in one wave of `most`. Otherwise a
// block has all units of several tokens, so that the blocks make one wave.
inline Parts parts_of(const AppendCall& call, const Units& units, int64_t entries, int64_t most) {
  const int64_t tokens = entries * call.tokens, wanted = ceil_div(units.all, kThreads);
  const int64_t slices = std::max<int64_t>(tokens * wanted <= most ? wanted : 1, 1);
  Parts parts{};
  parts.tokens = static_cast<int32_t>(std::clamp<int64_t>(ceil_div(tokens * slices, most), 1, kMostTokens));
  parts.chunks = Divisor(ceil_div(call.tokens, parts.tokens)), parts.slices = Divisor(slices);
  parts.units = Divisor(std::max<int64_t>(ceil_div(units.all, slices), 1));
  return parts;
}

template <class T, class Pool, Row R>
cudaError_t launch_tokens(const AppendProblem& p, const Device& device, cudaStream_t stream) {
  return with_words<T>(p, p.kv_heads, [&]<int kWord>(const Units& units) {
    return for_each_launch(p, [&](const AppendCall& call, int64_t entries) {
      const Parts parts = parts_of(call, units, entries, int64_t{R.blocks} * device.sm_count);
      const size_t starts = call.packed ? Starts::bytes(call.sequences) : 0;
      const int64_t blocks = entries * parts.chunks.value * parts.slices.value;
      return launch(append_tokens<T, Pool, kWord, R.blocks>, blocks, kThreads, starts, stream, call, units,
                    parts);
    });
  });
}

template <class T, Row R>
cudaError_t launch_row(const AppendProblem& p, const Device& device, cudaStream_t stream) {
  static_assert(R.warps == kWarps);
  if constexpr (R.design == Design::kDynamic) {
    return launch_dynamic<T>(p, stream);
  } else {
    return is_float8(p.pool_dtype) ? launch_tokens<T, uint8_t, R>(p, device, stream)
                                   : launch_tokens<T, T, R>(p, device, stream);
  }
}

}  // namespace jax_flash::append::inline JF_ARCH_NAMESPACE
