// append_kv by bulk copies (sm_90 and newer), where a pool holds what the caller has: a warp has a token at a
// time. Its rows come to shared memory, are rotated there and leave for the pool; V never passes a register.
// While the first rows and angles are on their way, every warp looks up for itself which of its slots a later
// token overwrites (own.cuh), as no barrier is needed then.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/rotary.h"
#include "cuda/append/own.cuh"
#include "cuda/append/words.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/shared.cuh"
#if __CUDA_ARCH__ >= 900
#include "cuda/ptx/tma.cuh"
#endif

namespace jax_flash::append {

inline constexpr int kBulkBlocks = 2;  // per SM
inline constexpr int kMostStages = 4;
inline constexpr int kLeastBytes = 2048;  // of a token: a warp's work on it is worth while
#ifndef RUNS_AT_ONCE
#define RUNS_AT_ONCE 5
#endif
#ifndef RUNS_OF_WARP
#define RUNS_OF_WARP 160
#endif
inline constexpr int kRunsAtOnce = RUNS_AT_ONCE;  // that a lane looks up together
inline constexpr int kRunsOfWarp = RUNS_OF_WARP;  // more are looked up by the block

// A block has `tokens` tokens of one leading entry, and each of its warps `stages` stages. A stage: a token's
// keys at all heads, its values, its cosines, its sines.
struct BulkParts {
  Divisor chunks;
  int32_t tokens, stages;
  int32_t key_bytes, value_bytes, angle_bytes;

  __host__ __device__ int32_t row_bytes() const { return key_bytes + value_bytes; }
  __host__ __device__ int32_t stage_bytes() const { return row_bytes() + 2 * angle_bytes; }
};

// The parts of a call on a device whose CTAs may have `shared_memory` bytes, of which `starts` go to packed
// sequences; no stages: the call is better off without bulk copies.
template <class T>
BulkParts bulk_parts(const AppendCall& call, int64_t entries, int32_t sm_count, int32_t shared_memory,
                     int64_t starts) {
  const int64_t most = int64_t{kBulkBlocks} * sm_count;
  const auto bytes = [&](int64_t elements, size_t size) {
    return static_cast<int32_t>(std::min<int64_t>(elements * static_cast<int64_t>(size), shared_memory));
  };
  BulkParts parts{};
  parts.key_bytes = bytes(int64_t{call.heads} * call.key.width, sizeof(T));
  parts.value_bytes = bytes(int64_t{call.heads} * call.value.width, sizeof(T));
  parts.angle_bytes = bytes(call.rotated, sizeof(float));
  const int64_t tokens = ceil_div(entries * call.tokens, most);
  parts.tokens = static_cast<int32_t>(std::clamp<int64_t>(tokens, 1, kMostTokens));
  parts.chunks = Divisor(ceil_div(call.tokens, parts.tokens));
  constexpr int64_t kReserved = 1024;  // of each CTA
  const int64_t room =
      shared_memory / kBulkBlocks - static_cast<int64_t>(sizeof(Shared)) - kReserved - starts;
#ifndef LEAST_TOKENS
#define LEAST_TOKENS 1
#endif
  const bool is_small = parts.row_bytes() < kLeastBytes || tokens < LEAST_TOKENS;
  const int64_t stages = is_small ? 0 : room / (int64_t{kWarps} * parts.stage_bytes());
  parts.stages = static_cast<int32_t>(std::clamp<int64_t>(stages, 0, kMostStages));
  return parts;
}

#if __CUDA_ARCH__ >= 900

// Which of a warp's tokens, `first` and every kWarps-th after it, a later one overwrites. Lane i has the page
// and slot of token i.
__device__ __noinline__ uint32_t find_overwritten(const AppendCall& call, int32_t entry, Starts starts,
                                                  int32_t first, int32_t count, int32_t page, int32_t slot) {
  uint32_t marks = 0;
  for (int32_t base = first; base < call.tokens; base += 32) {
    const int32_t row = base + static_cast<int32_t>(threadIdx.x % 32);
    Slot other{kNowhere, 0, 0, 0};
    if (row < call.tokens) other = find_slot(call, entry, starts, row);
    for (int32_t i = 0; i < count; ++i) {
      const bool same = __shfl_sync(~0u, page, i) == other.page && __shfl_sync(~0u, slot, i) == other.slot;
      if (same && other.page != kNowhere && row > first + i * kWarps) marks |= 1u << i;
    }
  }
  return __reduce_or_sync(~0u, marks);
}

// A warp of append_bulk, and its tokens: those of the block from its number on, kWarps apart.
template <class T, int kWord>
struct BulkWarp {
  const AppendCall& call;
  const Units& units;
  const BulkParts& parts;
  int32_t entry, first, count;  // first: the warp's first token; count: of the warp, at most 32
  uint32_t memory, full;        // its stages, and their barriers
  Slot to{kNowhere, 0, 0, 0};   // lane i: of token i
  uint32_t overwritten = 0;     // a bit for each token that a later one overwrites

  __device__ __forceinline__ static int lane() { return static_cast<int>(threadIdx.x % 32); }
  __device__ __forceinline__ uint32_t barrier(int32_t of_stage) const {
    return full + of_stage * static_cast<uint32_t>(sizeof(uint64_t));
  }
  // The warp's token i.
  __device__ __forceinline__ int32_t row(int32_t i) const { return first + i * kWarps; }

  // Calls copy(stream, head, offset in the stage, bytes) for the rows of a token: all heads at once, by lane
  // 0 and 1, where they lie one after the other (of `views`), else each by a lane of its own.
  template <class View, class Copy>
  __device__ __forceinline__ void for_each_row(View view, Copy copy) const {
    const AppendStream& own = lane() == 0 ? call.key : call.value;
    const bool whole = view(call.key).head == call.key.width &&
                       (call.value.width == 0 || view(call.value).head == call.value.width);
    if (whole) {
      if (lane() < 2 && own.width > 0)  // latent pools have no values
        copy(own, 0, lane() == 0 ? 0 : parts.key_bytes, lane() == 0 ? parts.key_bytes : parts.value_bytes);
      return;
    }
    for (int32_t i = lane(); i < 2 * call.heads; i += 32) {
      const bool of_value = i >= call.heads;
      const AppendStream& stream = of_value ? call.value : call.key;
      const int32_t head = of_value ? i - call.heads : i;
      const auto bytes = stream.width * static_cast<int32_t>(sizeof(T));
      if (bytes > 0) copy(stream, head, (of_value ? parts.key_bytes : 0) + head * bytes, bytes);
    }
  }

  // Starts to load the rows of a token into a stage.
  __device__ __forceinline__ void load_rows(int32_t i, int32_t of_stage) const {
    if (lane() == 0) ptx::barrier_expect(barrier(of_stage), static_cast<uint32_t>(parts.stage_bytes()));
    __syncwarp();
    const uint32_t at = memory + of_stage * parts.stage_bytes();
    for_each_row([](const AppendStream& stream) -> const AppendView& { return stream.rows; },
                 [&](const AppendStream& stream, int32_t head, int32_t offset, int32_t bytes) {
                   ptx::copy_bytes(at + offset, stream.rows.template at<const T>(entry, 0, head, row(i)),
                                   static_cast<uint32_t>(bytes), barrier(of_stage));
                 });
  }
  // Its angles, which its position decides.
  __device__ __forceinline__ void load_angles(int32_t i, int32_t of_stage) const {
    const int32_t position = max(__shfl_sync(~0u, to.position, i), 0);
    if (parts.angle_bytes == 0 || lane() > 1) return;
    const AppendView& table = lane() == 0 ? call.cos : call.sin;
    const uint32_t at =
        memory + of_stage * parts.stage_bytes() + parts.row_bytes() + lane() * parts.angle_bytes;
    ptx::copy_bytes(at, table.at<const float>(entry, 0, 0, rotary_row(position, call.positions)),
                    static_cast<uint32_t>(parts.angle_bytes), barrier(of_stage));
  }

  // Rotates the key of a stage. A lane has every 32nd pair of words.
  __device__ __forceinline__ void rotate(int32_t of_stage) const {
    uint8_t* const rows = ptx::dynamic_shared() + (memory + of_stage * parts.stage_bytes() -
                                                   ptx::shared_address(ptx::dynamic_shared()));
    const auto* const cos = reinterpret_cast<const float*>(rows + parts.row_bytes());
    const int32_t pairs = units.pairs.value;
    int32_t head = units.pairs.quotient(lane()), pair = lane() - head * pairs;
    const int32_t heads = units.pairs.quotient(32), others = 32 - heads * pairs;  // from one to the next
    for (int32_t number = lane(); number < units.key_pairs; number += 32) {
      Unit<T, T, kWord> unit;
      unit.second = 0;
      T* const key = reinterpret_cast<T*>(rows) + head * call.key.width;
      const int32_t angle = pair * kWord;
      auto* const a = reinterpret_cast<Words<T, kWord>*>(key + (call.interleaved ? 2 * angle : angle));
      auto* const b = reinterpret_cast<Words<T, kWord>*>(
          key + (call.interleaved ? 2 * angle + kWord : angle + call.rotated));
      unit.a = *a, unit.b = *b;
      unit.cos = *reinterpret_cast<const Words<float, kWord>*>(cos + angle);
      unit.sin = *reinterpret_cast<const Words<float, kWord>*>(cos + call.rotated + angle);
      unit.rotate(call);
      *a = unit.a, *b = unit.b;
      head += heads, pair += others;
      if (pair >= pairs) pair -= pairs, ++head;
    }
  }

  // Stores what a stage has become.
  __device__ __forceinline__ void store(int32_t of_stage, int32_t page, int32_t slot) const {
    ptx::fence_async_shared();
    __syncwarp();
    const uint32_t from = memory + of_stage * parts.stage_bytes();
    for_each_row([](const AppendStream& stream) -> const AppendView& { return stream.pool; },
                 [&](const AppendStream& stream, int32_t head, int32_t offset, int32_t bytes) {
                   ptx::store_bytes(stream.pool.template at<T>(entry, page, head, slot), from + offset,
                                    static_cast<uint32_t>(bytes));
                 });
    ptx::bulk_commit();
  }

  // Finds where the warp's tokens go. Angles of the first tokens are asked for before the pages are looked
  // up.
  __device__ __forceinline__ void find(const Starts& starts) {
    const Place place = lane() < count ? find_place(call, entry, starts, row(lane())) : Place{0, -1, 0};
    to = {kNowhere, place.position - place.index * call.page_size.value, place.position, place.sequence};
    if (place.position >= 0) to.page = page_at(call, entry, place.sequence, place.index);
    for (int32_t i = 0; i < min(count, parts.stages); ++i) load_angles(i, i);
    if (count > 0 && all_runs(call, starts) <= kRunsOfWarp && meets(starts, place))
      overwritten = find_overwritten(call, entry, starts, first, count, to.page, to.slot);
  }

  __device__ __forceinline__ void run() const {
    int32_t of_stage = 0;
    uint32_t phase = 0;
    for (int32_t i = 0; i < count; ++i) {
      ptx::barrier_wait(barrier(of_stage), phase);
      const int32_t page = __shfl_sync(~0u, to.page, i), slot = __shfl_sync(~0u, to.slot, i);
      if (page != kNowhere && !(overwritten >> i & 1)) {
        rotate(of_stage);
        store(of_stage, page, slot);
      }
      const int32_t next = i + parts.stages;
      if (next < count) {
        ptx::bulk_wait_read<0>();  // the stores have read the stage
        __syncwarp();
        load_rows(next, of_stage);
        load_angles(next, of_stage);
      }
      if (++of_stage == parts.stages) of_stage = 0, phase ^= 1;
    }
    ptx::bulk_wait_read<0>();
  }

 private:
  // Whether another run goes to the page of one of the warp's tokens. Every lane looks runs up, kRunsAtOnce
  // together.
  __device__ __forceinline__ bool meets(const Starts& starts, const Place& place) const {
    const int32_t all = all_runs(call, starts);
    bool found = false;
#pragma unroll 1
    for (int32_t base = lane(); base - lane() < all; base += 32 * kRunsAtOnce) {
      int32_t sequence[kRunsAtOnce], length[kRunsAtOnce];
      Run runs[kRunsAtOnce];
#pragma unroll
      for (int j = 0; j < kRunsAtOnce; ++j) {
        sequence[j] = sequence_of_run(call, starts, min(base + 32 * j, all - 1));
        length[j] = length_before(call, entry, sequence[j]);
      }
#pragma unroll
      for (int j = 0; j < kRunsAtOnce; ++j) {
        runs[j] = place_run(call, starts, min(base + 32 * j, all - 1), sequence[j], length[j]);
        if (runs[j].count > 0) runs[j].page = page_at(call, entry, sequence[j], runs[j].index);
      }
#pragma unroll 1
      for (int32_t i = 0; i < count; ++i) {
        const int32_t page = __shfl_sync(~0u, to.page, i), own = __shfl_sync(~0u, place.sequence, i),
                      index = __shfl_sync(~0u, place.index, i);
#pragma unroll
        for (const Run& run : runs)
          found |= page != kNowhere && run.page == page && (run.sequence != own || run.index != index);
      }
    }
    return __any_sync(~0u, found);
  }
};

#endif

template <class T, int kWord>
__global__ void __launch_bounds__(kThreads, kBulkBlocks)
    append_bulk([[maybe_unused]] const __grid_constant__ AppendCall call,
                [[maybe_unused]] const __grid_constant__ Units units,
                [[maybe_unused]] const __grid_constant__ BulkParts parts) {
#if __CUDA_ARCH__ >= 900
  __shared__ Shared shared;
  __shared__ uint64_t full[kWarps][kMostStages];
  const auto warp = static_cast<int32_t>(threadIdx.x / 32);
  const int32_t entry = parts.chunks.quotient(static_cast<int32_t>(blockIdx.x));
  const int32_t first = (static_cast<int32_t>(blockIdx.x) - entry * parts.chunks.value) * parts.tokens;
  const int32_t count = min(parts.tokens, call.tokens - first);
  uint8_t* const memory = ptx::dynamic_shared();
  const int32_t warp_bytes = parts.stages * parts.stage_bytes();
  BulkWarp<T, kWord> own{call,
                         units,
                         parts,
                         entry,
                         first + warp,
                         count > warp ? (count - warp - 1) / kWarps + 1 : 0,
                         ptx::shared_address(memory + warp * warp_bytes),
                         ptx::shared_address(full[warp])};
  if (threadIdx.x % 32 == 0) {
    for (int i = 0; i < kMostStages; ++i) ptx::barrier_init(ptx::shared_address(&full[warp][i]), 1);
    ptx::fence_barriers();
  }
  __syncwarp();
  for (int32_t i = 0; i < min(own.count, parts.stages); ++i) own.load_rows(i, i);
  auto* const of_starts = reinterpret_cast<int32_t*>(memory + kWarps * warp_bytes);
  const Starts starts{of_starts, of_starts + call.sequences + 1};
  if (call.packed) find_starts(call, entry, starts, shared.scan);
  own.find(starts);
  if (all_runs(call, starts) > kRunsOfWarp) {
    find_own(call, entry, {first, count, count > kFew}, starts, shared);
    const int32_t token = warp + own.lane() * kWarps;
    own.overwritten = __ballot_sync(~0u, token < count && shared.overwritten[min(token, kMostTokens - 1)]);
  }
  own.run();
#endif
}

}  // namespace jax_flash::append
