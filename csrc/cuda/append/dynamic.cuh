// append_kv with dynamic scales: a page's scale follows its largest element (core/float8.h).
//
// A block handles one run of tokens that go to one page; each of its warps handles one KV head at a time. If
// the tables send several runs to one page, the first run's block handles all of them, in order.
#pragma once

#include <cstdint>

#include "cuda/append/tokens.cuh"
#include "cuda/append/words.cuh"
#include "cuda/launch.h"
#include "cuda/ptx/shared.cuh"

namespace jax_flash::append::inline JF_ARCH_NAMESPACE {

struct DynamicParts {
  Divisor runs, groups;  // runs of a leading entry; groups of kWarps heads
};

// The maximum over a warp, of numbers given by their bits.
__device__ __forceinline__ uint32_t warp_maximum(uint32_t x) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) x = max(x, __shfl_xor_sync(~0u, x, step));
  return x;
}

// One warp requantises the slots before `end` of a page at one KV head. It works byte by byte: that is slow,
// but a page's scale seldom changes.
__device__ __forceinline__ void requantise(const AppendCall& call, const AppendStream& stream, int32_t entry,
                                           int32_t page, int32_t head, int32_t end, PageScale scale) {
  if (scale.before == scale.after) return;
  const float factor = scale.factor();
  for (int32_t at = static_cast<int32_t>(threadIdx.x % 32); at < end * stream.width; at += 32) {
    uint8_t* const x = stream.pool.at<uint8_t>(entry, page, head, at / stream.width) + at % stream.width;
    *x = float_to_float8(float8_to_float(*x, call.stored) * factor, call.stored);
  }
}

// One warp writes a run at one KV head. `units`: the units of one head.
template <class T, int kWord>
__device__ __forceinline__ void write_run(const AppendCall& call, const Units& units, int32_t entry,
                                          int32_t head, const Run& run) {
  const auto unit_at = [&](int32_t i, int32_t& token) {
    token = units.of_token.quotient(i);
    Unit<T, uint8_t, kWord> unit(call, units, i - token * units.all);
    unit.head = head;
    unit.load(call, entry, run.row + token);
    unit.load_angles(call, entry, run.position + token);
    return unit;
  };
  const auto lane = static_cast<int32_t>(threadIdx.x % 32);
  float* const of_key = call.key.scale.at<float>(entry, run.page, head, 0);
  float* const of_value = call.value.scale.at<float>(entry, run.page, head, 0);
  const float key_before = *of_key, value_before = *of_value;
  uint32_t largest[2] = {0, 0};
#pragma unroll 2
  for (int32_t i = lane; i < run.count * units.all; i += 32) {
    int32_t token;
    auto unit = unit_at(i, token);
    unit.rotate(call);
    const uint32_t x = unit.largest();
    largest[0] = max(largest[0], unit.of_value ? 0u : x),
    largest[1] = max(largest[1], unit.of_value ? x : 0u);
  }
  const PageScale key(key_before, run.slot, float_of_bits(warp_maximum(largest[0])), call.stored);
  const PageScale value(value_before, run.slot, float_of_bits(warp_maximum(largest[1])), call.stored);
  __syncwarp();  // all lanes have read the scales
  if (lane == 0) *of_key = key.after, *of_value = value.after;
  requantise(call, call.key, entry, run.page, head, run.slot, key);
  requantise(call, call.value, entry, run.page, head, run.slot, value);
#pragma unroll 1
  for (int32_t i = lane; i < run.count * units.all; i += 32) {
    int32_t token;
    auto unit = unit_at(i, token);
    unit.rotate(call);
    unit.store(call, entry, {run.page, run.slot + token, 0, 0}, unit.of_value ? value.after : key.after);
  }
  __syncwarp();  // the next run may be on the same page
}

template <class T, int kWord>
__global__ void __launch_bounds__(kThreads)
    append_dynamic(const __grid_constant__ AppendCall call, const __grid_constant__ Units units,
                   const __grid_constant__ DynamicParts parts) {
  __shared__ int32_t scan[kWarps], found[kThreads];
  int32_t* const memory = reinterpret_cast<int32_t*>(ptx::dynamic_shared());
  const Starts starts{memory, memory + call.sequences + 1};
  const int32_t part = parts.groups.quotient(static_cast<int32_t>(blockIdx.x));
  const int32_t group = static_cast<int32_t>(blockIdx.x) - part * parts.groups.value;
  const int32_t entry = parts.runs.quotient(part), own = part - entry * parts.runs.value;
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const int32_t head = group * kWarps + thread / 32;
  if (call.packed) find_starts(call, entry, starts, scan);
  const int32_t all = all_runs(call, starts);
  if (own >= all) return;
  const Run first = find_run(call, entry, starts, own);
  if (first.page == kNowhere) return;
  const auto same = [&](int32_t number) {
    return number < all && find_run(call, entry, starts, number).page == first.page;
  };
  bool taken = false;  // whether the block of an earlier run handles this run
  for (int32_t number = thread; number < own; number += kThreads) taken |= same(number);
  if (__syncthreads_or(taken)) return;
  if (head < call.heads) write_run<T, kWord>(call, units, entry, head, first);
  for (int32_t base = own + 1; base < all; base += kThreads) {
    found[thread] = same(base + thread);
    if (!__syncthreads_or(found[thread])) continue;
    for (int32_t i = 0; i < kThreads; ++i) {
      if (found[i] && head < call.heads)
        write_run<T, kWord>(call, units, entry, head, find_run(call, entry, starts, base + i));
    }
    __syncthreads();  // `found` will be written again
  }
}

template <class T>
cudaError_t launch_dynamic(const AppendProblem& p, cudaStream_t stream) {
  return with_words<T>(p, 1, [&]<int kWord>(const Units& units) {
    return for_each_launch(p, [&](const AppendCall& call, int64_t entries) {
      // Only the device knows how many runs packed tokens have.
      const int64_t most = int64_t{call.sequences} * 2 + call.tokens / call.page_size.value;
      const int64_t runs =
          call.packed ? std::min<int64_t>(most, call.tokens) : int64_t{call.sequences} * call.runs.value;
      const DynamicParts parts{Divisor(runs), Divisor(ceil_div(p.kv_heads, kWarps))};
      const size_t starts = call.packed ? Starts::bytes(call.sequences) : 0;
      return launch(append_dynamic<T, kWord>, entries * runs * parts.groups.value, kThreads, starts, stream,
                    call, units, parts);
    });
  });
}

}  // namespace jax_flash::append::inline JF_ARCH_NAMESPACE
