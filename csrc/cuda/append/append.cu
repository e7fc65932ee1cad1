// append_kv: writes new keys and values into the slots of a page pool. Keys are rotated, and both are
// quantised where the pool is float8.
//
// Every block has a range of tokens. Two tokens may be sent to one slot, and then the later one must win.
// That takes a page that stands twice in what the tables are read for: a block looks all pages up, and only
// where one of its own comes again, it looks up the slots of all later tokens and leaves out those of its own
// that one of them overwrites. So every slot has one writer, and no block waits for another.
#include "cuda/append/append.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <limits>

#include "cuda/append/dynamic.cuh"
#include "cuda/append/tokens.cuh"
#include "cuda/append/words.cuh"
#include "cuda/launch.h"
#include "cuda/ptx/shared.cuh"

namespace jax_flash {
namespace append {
namespace {

constexpr int kBlocksPerMultiprocessor = 3;  // of the grid, at most: one wave
constexpr int kAtOnce = 2;                   // runs that a thread looks up together
constexpr int32_t kFew = 8;  // own tokens: more are compared only where a filter has their page
constexpr int32_t kFilterBits = 10;

// The parts of a call: a block has `tokens` tokens of one leading entry, and the units [slice · units, …) of
// each.
struct Parts {
  Divisor chunks, slices, units;
  int32_t tokens;
};

struct Shared {
  Slot own[kThreads];
  bool overwritten[kThreads];
  bool filter[1 << kFilterBits];  // whether an own token is on a page with this hash
  int32_t scan[kWarps];
};

__device__ __forceinline__ uint32_t hash(int32_t page) {
  constexpr uint32_t kMultiplier = 0x9E3779B1u;  // a prime near 2³² / golden ratio
  return static_cast<uint32_t>(page) * kMultiplier >> (32 - kFilterBits);
}

// The tokens [first, first + count) of a block, and whether the filter is used.
struct Own {
  int32_t first, count;
  bool filtered;

  __device__ __forceinline__ bool may_hold(int32_t page, const Shared& shared) const {
    return page != kNowhere && (!filtered || shared.filter[hash(page)]);
  }
};

// Whether a run of other tokens goes to the page of an own one.
__device__ __forceinline__ bool meets_own(const AppendCall& call, const Own& own, const Run& run,
                                          const Shared& shared) {
  bool meets = false;
  for (int32_t i = 0; own.may_hold(run.page, shared) && i < own.count; ++i) {
    const Slot& to = shared.own[i];
    meets |= to.page == run.page &&
             (to.sequence != run.sequence || call.page_size.quotient(to.position) != run.index);
  }
  return meets;
}

// Marks the own tokens that a later one overwrites.
__device__ __noinline__ void find_overwritten(const AppendCall& call, int32_t entry, Starts starts, Own own,
                                              Shared& shared) {
  for (int32_t row = own.first + static_cast<int32_t>(threadIdx.x); row < call.tokens; row += kThreads) {
    const Slot slot = find_slot(call, entry, starts, row);
    if (!own.may_hold(slot.page, shared)) continue;
    for (int32_t i = 0; i < min(own.count, row - own.first); ++i) {
      const Slot& to = shared.own[i];
      if (to.page == slot.page && to.slot == slot.slot) shared.overwritten[i] = true;
    }
  }
  __syncthreads();
}

// The slots of the own tokens, and which of them a later token overwrites.
__device__ __forceinline__ void find_own(const AppendCall& call, int32_t entry, const Own& own,
                                         int32_t* memory, Shared& shared) {
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const Starts starts{memory, memory + call.sequences + 1};
  if (own.filtered) {
    for (int32_t i = thread; i < 1 << kFilterBits; i += kThreads) shared.filter[i] = false;
    __syncthreads();
  }
  if (call.packed) find_starts(call, entry, starts, shared.scan);
  Slot slot{kNowhere, 0, 0, 0};
  if (thread < own.count) slot = find_slot(call, entry, starts, own.first + thread);
  const int32_t all = all_runs(call, starts);
  bool meets = false;
  int32_t number = thread;
#pragma unroll 1
  do {  // once even where no sequence has a token
    Run runs[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      runs[i].page = kNowhere;
      if (number + i * kThreads < all) runs[i] = find_run(call, entry, starts, number + i * kThreads);
    }
    if (number == thread) {
      if (thread < own.count) {
        shared.own[thread] = slot, shared.overwritten[thread] = false;
        if (own.filtered && slot.page != kNowhere) shared.filter[hash(slot.page)] = true;
      }
      __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) meets |= meets_own(call, own, runs[i], shared);
    number += kAtOnce * kThreads;
  } while (number - thread < all);
  if (__syncthreads_or(meets)) find_overwritten(call, entry, starts, own, shared);
}

template <class T, class Pool, int kWord>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    append_tokens(const __grid_constant__ AppendCall call, const __grid_constant__ Units units,
                  const __grid_constant__ Parts parts) {
  __shared__ Shared shared;
  const int32_t part = parts.slices.quotient(static_cast<int32_t>(blockIdx.x));
  const int32_t slice = static_cast<int32_t>(blockIdx.x) - part * parts.slices.value;
  const int32_t entry = parts.chunks.quotient(part);
  const int32_t first = (part - entry * parts.chunks.value) * parts.tokens;
  const int32_t count = min(parts.tokens, call.tokens - first);
  const int32_t first_unit = slice * parts.units.value;
  const int32_t items = count * parts.units.value;  // those past the last unit do nothing
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

  // What does not depend on the slots is asked for before they are looked up.
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
  find_own(call, entry, {first, count, count > kFew}, reinterpret_cast<int32_t*>(ptx::dynamic_shared()),
           shared);
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

// kThreads units or fewer of a token for each block where the device has room for so many blocks; else all
// units, of as many tokens as leave so many blocks.
Parts parts_of(const AppendCall& call, const Units& units, int64_t entries, int32_t sm_count) {
  const int64_t most = int64_t{kBlocksPerMultiprocessor} * sm_count;
  const int64_t tokens = entries * call.tokens, wanted = ceil_div(units.all, kThreads);
  const int64_t slices = std::max<int64_t>(tokens * wanted <= most ? wanted : 1, 1);
  Parts parts{};
  parts.tokens = static_cast<int32_t>(std::clamp<int64_t>(ceil_div(tokens * slices, most), 1, kThreads));
  parts.chunks = Divisor(ceil_div(call.tokens, parts.tokens)), parts.slices = Divisor(slices);
  parts.units = Divisor(std::max<int64_t>(ceil_div(units.all, slices), 1));
  return parts;
}

template <class T, class Pool>
cudaError_t launch_for(const AppendProblem& p, int32_t sm_count, cudaStream_t stream) {
  return with_words<T>(p, p.kv_heads, [&]<int kWord>(const Units& units) {
    return for_each_launch(p, [&](const AppendCall& call, int64_t entries) {
      const Parts parts = parts_of(call, units, entries, sm_count);
      const size_t starts = call.packed ? Starts::bytes(call.sequences) : 0;
      const int64_t blocks = entries * parts.chunks.value * parts.slices.value;
      return launch(append_tokens<T, Pool, kWord>, blocks, kThreads, starts, stream, call, units, parts);
    });
  });
}

template <class T>
cudaError_t launch_for(const AppendProblem& p, int32_t sm_count, cudaStream_t stream) {
  if (p.dynamic) return launch_dynamic<T>(p, stream);
  if (is_float8(p.pool_dtype)) return launch_for<T, uint8_t>(p, sm_count, stream);
  return launch_for<T, T>(p, sm_count, stream);
}

}  // namespace
}  // namespace append

cudaError_t launch_append(const AppendProblem& p, int32_t sm_count, cudaStream_t stream) {
  const int64_t tokens = int64_t{p.rows} * (p.packed() ? 1 : p.batch);
  if (tokens == 0 || p.batch == 0 || p.pages == 0 || p.kv_heads == 0) return cudaSuccess;
  if (tokens > std::numeric_limits<int32_t>::max() / 2) return cudaErrorInvalidValue;
  if (p.dtype == DType::kF16) return append::launch_for<__half>(p, sm_count, stream);
  if (p.dtype == DType::kBF16) return append::launch_for<__nv_bfloat16>(p, sm_count, stream);
  return append::launch_for<float>(p, sm_count, stream);
}

}  // namespace jax_flash
