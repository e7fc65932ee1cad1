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
inline constexpr int kRunsAtOnce = 4;     // that a lane looks up together
inline constexpr int kRunsOfWarp = 512;   // more are looked up by the block

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
  const bool is_small = parts.row_bytes() < kLeastBytes;
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
  uint8_t* memory;              // its stages
  uint64_t* full;
  Slot to{kNowhere, 0, 0, 0};  // lane i: of token i
  uint32_t overwritten = 0;    // a bit for each token that a later one overwrites

  __device__ __forceinline__ static int lane() { return static_cast<int>(threadIdx.x % 32); }
  __device__ __forceinline__ uint8_t* stage(int32_t i) const {
    return memory + i % parts.stages * parts.stage_bytes();
  }
  __device__ __forceinline__ uint32_t barrier(int32_t i) const {
    return ptx::shared_address(&full[i % parts.stages]);
  }

  // Calls copy(offset in bytes, head, bytes) for one stream of a token: for all heads at once where they lie
  // one after the other, else for each by a lane of its own.
  template <class Copy>
  __device__ __forceinline__ void for_each_row(const AppendView& view, int32_t width, Copy copy) const {
    if (width == 0) return;  // latent pools have no values
    const auto bytes = static_cast<uint32_t>(width) * static_cast<uint32_t>(sizeof(T));
    if (view.head == width) {
      if (lane() == 0) copy(0u, 0, bytes * static_cast<uint32_t>(call.heads));
    } else {
      for (int32_t head = lane(); head < call.heads; head += 32) copy(head * bytes, head, bytes);
    }
  }

  // Starts to load the rows of the warp's token i.
  __device__ __forceinline__ void load_rows(int32_t i) const {
    if (lane() == 0) ptx::barrier_expect(barrier(i), static_cast<uint32_t>(parts.stage_bytes()));
    __syncwarp();
    const uint32_t memory_of = ptx::shared_address(stage(i));
    const int32_t from = row(i);
    const auto load = [&](const AppendStream& stream, uint32_t at) {
      for_each_row(stream.rows, stream.width, [&](uint32_t offset, int32_t head, uint32_t bytes) {
        ptx::copy_bytes(at + offset, stream.rows.template at<const T>(entry, 0, head, from), bytes,
                        barrier(i));
      });
    };
    load(call.key, memory_of);
    load(call.value, memory_of + parts.key_bytes);
  }
  // Its angles, which its position decides.
  __device__ __forceinline__ void load_angles(int32_t i) const {
    const int32_t position = max(__shfl_sync(~0u, to.position, i), 0);
    if (parts.angle_bytes == 0 || lane() > 1) return;
    const AppendView& table = lane() == 0 ? call.cos : call.sin;
    const uint32_t at = ptx::shared_address(stage(i)) + parts.row_bytes() + lane() * parts.angle_bytes;
    ptx::copy_bytes(at, table.at<const float>(entry, 0, 0, rotary_row(position, call.positions)),
                    static_cast<uint32_t>(parts.angle_bytes), barrier(i));
  }

  __device__ __forceinline__ void rotate(int32_t i) const {
    uint8_t* const rows = stage(i);
    const auto* const cos = reinterpret_cast<const float*>(rows + parts.row_bytes());
    const float* const sin = cos + call.rotated;
    for (int32_t number = lane(); number < units.key_pairs; number += 32) {
      Unit<T, T, kWord> unit(call, units, number);
      T* const key = reinterpret_cast<T*>(rows) + unit.head * call.key.width;
      auto* const a = reinterpret_cast<Words<T, kWord>*>(key + unit.first);
      auto* const b = reinterpret_cast<Words<T, kWord>*>(key + unit.second);
      unit.a = *a, unit.b = *b;
      unit.cos = *reinterpret_cast<const Words<float, kWord>*>(cos + unit.angle);
      unit.sin = *reinterpret_cast<const Words<float, kWord>*>(sin + unit.angle);
      unit.rotate(call);
      *a = unit.a, *b = unit.b;
    }
  }

  // Stores what the warp's token i has become.
  __device__ __forceinline__ void store(int32_t i, int32_t page, int32_t slot) const {
    ptx::fence_async_shared();
    __syncwarp();
    const uint32_t from = ptx::shared_address(stage(i));
    const auto store_stream = [&](const AppendStream& stream, uint32_t at) {
      for_each_row(stream.pool, stream.width, [&](uint32_t offset, int32_t head, uint32_t bytes) {
        ptx::store_bytes(stream.pool.template at<T>(entry, page, head, slot), at + offset, bytes);
      });
    };
    store_stream(call.key, from);
    store_stream(call.value, from + parts.key_bytes);
    ptx::bulk_commit();
  }

  // Lane i: the place of the warp's token i. Angles of the first tokens are asked for before the pages are
  // looked up.
  __device__ __forceinline__ void find(const Starts& starts, Shared& shared, bool by_block) {
    const int32_t own_row = row(min(lane(), count - 1));
    const Place place = lane() < count ? find_place(call, entry, starts, own_row) : Place{0, -1, 0};
    to = {kNowhere, place.position - place.index * call.page_size.value, place.position, place.sequence};
    if (place.position >= 0) to.page = page_at(call, entry, place.sequence, place.index);
    for (int32_t i = 0; i < min(count, parts.stages); ++i) load_angles(i);
    if (by_block) {
      overwritten =
          __ballot_sync(~0u, lane() < count && shared.overwritten[min(own(lane()), kMostTokens - 1)]);
    } else if (meets(starts, place)) {
      overwritten = find_overwritten(call, entry, starts, first, count, to.page, to.slot);
    }
  }

  __device__ __forceinline__ void run() const {
    for (int32_t i = 0; i < count; ++i) {
      ptx::barrier_wait(barrier(i), static_cast<uint32_t>(i / parts.stages));
      const int32_t page = __shfl_sync(~0u, to.page, i), slot = __shfl_sync(~0u, to.slot, i);
      if (page != kNowhere && !(overwritten >> i & 1)) {
        rotate(i);
        store(i, page, slot);
      }
      const int32_t next = i + parts.stages;
      if (next >= count) continue;
      ptx::bulk_wait_read<0>();  // the stores have read the stage
      __syncwarp();
      load_rows(next);
      load_angles(next);
    }
    ptx::bulk_wait_read<0>();
  }

 private:
  // The warp's token i: its number in the block, and its row.
  __device__ __forceinline__ static int32_t own(int32_t i) {
    return static_cast<int32_t>(threadIdx.x / 32) + i * kWarps;
  }
  __device__ __forceinline__ int32_t row(int32_t i) const { return first + i * kWarps; }

  // Whether another run goes to the page of one of the warp's tokens.
  __device__ __forceinline__ bool meets(const Starts& starts, const Place& place) const {
    const int32_t all = all_runs(call, starts);
    bool found = false;
#pragma unroll 1
    for (int32_t base = 0; base < all; base += 32 * kRunsAtOnce) {
      Run runs[kRunsAtOnce];
#pragma unroll
      for (int j = 0; j < kRunsAtOnce; ++j) {
        const int32_t number = base + 32 * j + lane();
        runs[j].page = kNowhere;
        if (number < all) runs[j] = find_run(call, entry, starts, number);
      }
#pragma unroll 1
      for (int32_t i = 0; i < count; ++i) {
        const int32_t page = __shfl_sync(~0u, to.page, i), sequence = __shfl_sync(~0u, place.sequence, i),
                      index = __shfl_sync(~0u, place.index, i);
#pragma unroll
        for (const Run& run : runs)
          found |= page != kNowhere && run.page == page && (run.sequence != sequence || run.index != index);
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
                         memory + warp * warp_bytes,
                         full[warp]};
  if (threadIdx.x % 32 == 0) {
    for (int i = 0; i < kMostStages; ++i) ptx::barrier_init(ptx::shared_address(&full[warp][i]), 1);
    ptx::fence_barriers();
  }
  __syncwarp();
  for (int32_t i = 0; i < min(own.count, parts.stages); ++i) own.load_rows(i);
  auto* const of_starts = reinterpret_cast<int32_t*>(memory + kWarps * warp_bytes);
  const Starts starts{of_starts, of_starts + call.sequences + 1};
  if (call.packed) find_starts(call, entry, starts, shared.scan);
  const bool by_block = all_runs(call, starts) > kRunsOfWarp;
  if (by_block) find_own(call, entry, {first, count, count > kFew}, starts, shared);
  if (own.count == 0) return;
  own.find(starts, shared, by_block);
  own.run();
#endif
}

}  // namespace jax_flash::append
