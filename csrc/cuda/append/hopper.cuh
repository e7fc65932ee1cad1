// append_kv by bulk copies (sm_90 and newer), for pools of the caller's dtype. A warp handles one token at a
// time: bulk copies bring its rows to shared memory, where keys are rotated, and from there to the pool. V
// never passes through registers. While the first rows and angles are loaded, every warp finds out by itself
// which of its slots a later token overwrites (own.cuh), so no barrier is needed.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/rotary.h"
#include "cuda/append/own.cuh"
#include "cuda/append/words.cuh"
#include "cuda/launch.h"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/registry.h"

namespace jax_flash::append::inline JF_ARCH_NAMESPACE {

inline constexpr int kLeastBytes = 2048;  // bytes per token; for fewer, a warp per token is not worth while
// Tokens per block; with fewer, looking up slots takes longer than the copies.
inline constexpr int kLeastTokens = 3;
// A run is the tokens of a sequence that go to one page (tokens.cuh).
inline constexpr int kRunsAtOnce = 5;    // runs that a lane looks up together
inline constexpr int kRunsOfWarp = 160;  // a warp looks up this many runs; if there are more, the block does

// The copies of a lane. Each lane copies one part of every token: the key, the value, the cosines or the
// sines. Adjacent heads make one piece; otherwise each head is a piece.
struct BulkLane {
  const uint8_t* from;
  uint8_t* to;  // the pool; null for angles
  int64_t entry_from, row, piece_from;
  int64_t entry_to, page, slot, piece_to;
  int32_t at, bytes, pieces;  // at: offset in a stage
};
// kAngleLane: the lane of the cosines; the next one has the sines.
inline constexpr int kBulkLanes = 4, kAngleLane = 2;

// A block handles `tokens` tokens of one leading entry, and each of its warps has `stages` stages. A stage
// holds a token's keys at all heads, its values, its cosines and its sines.
struct BulkParts {
  BulkLane lanes[kBulkLanes];
  Divisor chunks;
  int32_t tokens, stages;
  int32_t key_bytes, value_bytes, angle_bytes;

  __host__ __device__ int32_t row_bytes() const { return key_bytes + value_bytes; }
  __host__ __device__ int32_t stage_bytes() const { return row_bytes() + 2 * angle_bytes; }
};

template <class T>
BulkLane row_lane(const AppendCall& call, const AppendStream& stream, int32_t at) {
  constexpr auto kSize = static_cast<int64_t>(sizeof(T));
  const AppendView &rows = stream.rows, &pool = stream.pool;
  const bool whole = rows.head == stream.width && pool.head == stream.width;
  // Latent pools have no values: their width is 0, and so is the number of pieces.
  return {static_cast<const uint8_t*>(rows.data),
          static_cast<uint8_t*>(pool.data),
          rows.leading * kSize,
          rows.row * kSize,
          rows.head * kSize,
          pool.leading * kSize,
          pool.batch * kSize,
          pool.row * kSize,
          pool.head * kSize,
          at,
          static_cast<int32_t>(stream.width * (whole ? call.heads : 1) * kSize),
          stream.width == 0 ? 0
          : whole           ? 1
                            : call.heads};
}
inline BulkLane angle_lane(const AppendView& table, int32_t at, int32_t bytes) {
  constexpr int64_t kSize = sizeof(float);
  BulkLane lane{};
  lane.from = static_cast<const uint8_t*>(table.data);
  lane.entry_from = table.leading * kSize, lane.row = table.row * kSize;
  lane.at = at, lane.bytes = bytes, lane.pieces = bytes > 0 ? 1 : 0;
  return lane;
}

// How a call is divided among warps and stages. `starts` bytes of each CTA's shared memory are taken by the
// Starts of packed sequences. The result has no stages if the call is faster without bulk copies.
template <class T, Row R>
BulkParts bulk_parts(const AppendCall& call, int64_t entries, const Device& device, int64_t starts) {
  const int64_t most = int64_t{R.blocks} * device.sm_count;
  const auto bytes = [&](int64_t elements, size_t size) {
    return static_cast<int32_t>(
        std::min<int64_t>(elements * static_cast<int64_t>(size), device.shared_memory));
  };
  BulkParts parts{};
  parts.key_bytes = bytes(int64_t{call.heads} * call.key.width, sizeof(T));
  parts.value_bytes = bytes(int64_t{call.heads} * call.value.width, sizeof(T));
  parts.angle_bytes = bytes(call.rotated, sizeof(float));
  const int64_t tokens = ceil_div(entries * call.tokens, most);
  parts.tokens = static_cast<int32_t>(std::clamp<int64_t>(tokens, 1, kMostTokens));
  parts.chunks = Divisor(ceil_div(call.tokens, parts.tokens));
  constexpr int64_t kReserved = 1024;  // bytes of each CTA that the driver reserves
  const int64_t room =
      device.shared_memory / R.blocks - static_cast<int64_t>(sizeof(Shared)) - kReserved - starts;
  const bool is_small = parts.row_bytes() < kLeastBytes || tokens < kLeastTokens;
  const int64_t stages = is_small ? 0 : room / (int64_t{kWarps} * parts.stage_bytes());
  parts.stages = static_cast<int32_t>(std::clamp<int64_t>(stages, 0, R.stages));
  parts.lanes[0] = row_lane<T>(call, call.key, 0);
  parts.lanes[1] = row_lane<T>(call, call.value, parts.key_bytes);
  parts.lanes[2] = angle_lane(call.cos, parts.row_bytes(), parts.angle_bytes);
  parts.lanes[3] = angle_lane(call.sin, parts.row_bytes() + parts.angle_bytes, parts.angle_bytes);
  return parts;
}

// One bit for each of a warp's tokens (`first` and every kWarps-th after it): whether a later token
// overwrites it. Lane i passes the page and slot of token i.
static __device__ __noinline__ uint32_t find_overwritten(const AppendCall& call, int32_t entry, Starts starts,
                                                         int32_t first, int32_t count, int32_t page,
                                                         int32_t slot) {
  uint32_t marks = 0;
  for (int32_t base = first; base < call.tokens; base += 32) {
    const int32_t row = base + static_cast<int32_t>(threadIdx.x % 32);
    Slot other{kNowhere, 0, 0, 0};
    if (row < call.tokens) other = find_slot(call, entry, starts, row);
    for (int32_t i = 0; i < count; ++i) {
      const int32_t own_page = __shfl_sync(~0u, page, i), own_slot = __shfl_sync(~0u, slot, i);
      const bool same = own_page == other.page && own_slot == other.slot;
      if (same && other.page != kNowhere && row > first + i * kWarps) marks |= 1u << i;
    }
  }
  return __reduce_or_sync(~0u, marks);
}

// A warp of append_bulk. Warp w has every kWarps-th token of the block, from token w on.
template <class T, int kWord>
struct BulkWarp {
  const AppendCall& call;
  const Units& units;
  const BulkParts& parts;
  int32_t entry, first, count;  // first: the warp's first token; count: its number of tokens, at most 32
  uint32_t memory, full;        // its stages, and their barriers
  BulkLane own;                 // lanes that copy nothing have no pieces
  Slot to{kNowhere, 0, 0, 0};   // lane i has the slot of token i
  uint32_t overwritten = 0;     // a bit for each token that a later one overwrites

  __device__ __forceinline__ static int lane() { return static_cast<int>(threadIdx.x % 32); }
  __device__ __forceinline__ uint32_t barrier(int32_t stage) const {
    return full + stage * static_cast<uint32_t>(sizeof(uint64_t));
  }
  // The warp's token i.
  __device__ __forceinline__ int32_t row(int32_t i) const { return first + i * kWarps; }

  __device__ __forceinline__ void begin() {
    own = parts.lanes[min(lane(), kBulkLanes - 1)];
    if (lane() >= kBulkLanes) own.pieces = 0;
    own.from += entry * own.entry_from, own.to += entry * own.entry_to;
  }

  // Starts to load this lane's part of a token into a stage: a row of K or V, or a row of cosines or sines.
  __device__ __forceinline__ void load(int32_t source_row, int32_t stage) const {
    const uint32_t at = memory + stage * parts.stage_bytes() + own.at;
    const uint8_t* const from = own.from + source_row * own.row;
#pragma unroll 1
    for (int32_t piece = 0; piece < own.pieces; ++piece)
      ptx::copy_bytes(at + piece * own.bytes, from + piece * own.piece_from, static_cast<uint32_t>(own.bytes),
                      barrier(stage));
  }
  // Loads the rows of a token, and the angles at its position.
  __device__ __forceinline__ void load_rows(int32_t i, int32_t stage) const {
    if (lane() == 0) ptx::barrier_expect(barrier(stage), static_cast<uint32_t>(parts.stage_bytes()));
    __syncwarp();
    if (lane() < kAngleLane) load(row(i), stage);
  }
  __device__ __forceinline__ int32_t angle_row(int32_t i) const {
    return rotary_row(max(__shfl_sync(~0u, to.position, i), 0), call.positions);
  }

  // Rotates the key in a stage. Each lane takes every 32nd pair of words.
  __device__ __forceinline__ void rotate(int32_t stage) const {
    uint8_t* const rows = ptx::dynamic_shared() +
                          (memory + stage * parts.stage_bytes() - ptx::shared_address(ptx::dynamic_shared()));
    const auto* const cos = reinterpret_cast<const float*>(rows + parts.row_bytes());
    const int32_t pairs = units.pairs.value;
    int32_t head = units.pairs.quotient(lane()), pair = lane() - head * pairs;
    // A lane's next pair is this many heads and pairs further.
    const int32_t head_step = units.pairs.quotient(32), pair_step = 32 - head_step * pairs;
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
      head += head_step, pair += pair_step;
      if (pair >= pairs) pair -= pairs, ++head;
    }
  }

  // Stores the rows of a stage to the pool.
  __device__ __forceinline__ void store(int32_t stage, int32_t page, int32_t slot) const {
    ptx::fence_async_shared();
    __syncwarp();
    if (lane() >= kAngleLane) return;
    const uint32_t from = memory + stage * parts.stage_bytes() + own.at;
    uint8_t* const at = own.to + (page * own.page + slot * own.slot);
#pragma unroll 1
    for (int32_t piece = 0; piece < own.pieces; ++piece)
      ptx::store_bytes(at + piece * own.piece_to, from + piece * own.bytes, static_cast<uint32_t>(own.bytes));
    ptx::bulk_commit();
  }

  // Finds the slots of the warp's tokens. Loads of the first tokens' angles are issued before the pages are
  // looked up.
  __device__ __forceinline__ void find(const Starts& starts) {
    const Place place = lane() < count ? find_place(call, entry, starts, row(lane())) : Place{0, -1, 0};
    to = {kNowhere, place.position - place.index * call.page_size.value, place.position, place.sequence};
    if (place.position >= 0) to.page = page_at(call, entry, place.sequence, place.index);
#pragma unroll 1
    for (int32_t i = 0; i < min(count, parts.stages); ++i) {
      const int32_t angles = angle_row(i);
      if (lane() >= kAngleLane) load(angles, i);
    }
    const int32_t all = all_runs(call, starts);
    if (count == 0 || all > kRunsOfWarp) return;
    if (meets(starts, place, all))
      overwritten = find_overwritten(call, entry, starts, first, count, to.page, to.slot);
  }

  __device__ __forceinline__ void run() const {
    int32_t stage = 0;
    uint32_t phase = 0;
#pragma unroll 1
    for (int32_t i = 0; i < count; ++i) {
      const int32_t page = __shfl_sync(~0u, to.page, i), slot = __shfl_sync(~0u, to.slot, i);
      ptx::barrier_wait(barrier(stage), phase);
      if (page != kNowhere && !(overwritten >> i & 1)) {
        rotate(stage);
        store(stage, page, slot);
      }
      const int32_t next = i + parts.stages;
      if (next < count) {
        const int32_t angles = angle_row(next), source_row = lane() < kAngleLane ? row(next) : angles;
        ptx::bulk_wait_read<0>();  // the stores have read the stage
        if (lane() == 0) ptx::barrier_expect(barrier(stage), static_cast<uint32_t>(parts.stage_bytes()));
        __syncwarp();
        load(source_row, stage);
      }
      if (++stage == parts.stages) stage = 0, phase ^= 1;
    }
    ptx::bulk_wait_read<0>();
  }

 private:
  // Whether a run other than its own goes to the page of one of the warp's tokens. Each lane looks up
  // kRunsAtOnce runs at a time.
  __device__ __forceinline__ bool meets(const Starts& starts, const Place& place, int32_t all) const {
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

template <class T, int kWord, int kMostStages, int kBlocks>
__global__ void __launch_bounds__(kThreads, kBlocks)
    append_bulk(const __grid_constant__ AppendCall call, const __grid_constant__ Units units,
                const __grid_constant__ BulkParts parts) {
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
                         ptx::shared_address(full[warp]),
                         {}};
  if (threadIdx.x % 32 == 0) {
#pragma unroll 1
    for (int i = 0; i < parts.stages; ++i) ptx::barrier_init(ptx::shared_address(&full[warp][i]), 1);
    ptx::fence_barriers();
  }
  __syncwarp();
  own.begin();
#pragma unroll 1
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
}

// Whether the build has the kernel's code for this device, since it may have been built for other cards only.
template <class Kernel>
bool has_code(Kernel kernel) {
  cudaFuncAttributes attributes{};
  if (cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess) return true;
  cudaGetLastError();  // clears the error, or the next launch would return it
  return false;
}

// Returns cudaErrorNotSupported if alignment allows only single features to be copied, and for few or small
// tokens. The kernel of the next row of csrc/kernels.def then writes all tokens of the call, also those that
// earlier launches of this one have written.
template <class T, Row R>
cudaError_t launch_row(const AppendProblem& p, const Device& device, cudaStream_t stream) {
  static_assert(R.warps == kWarps);
  return with_words<T>(p, p.kv_heads, [&]<int kWord>(const Units& units) {
    if constexpr (kWord > 1) {
      const auto kernel = append_bulk<T, kWord, R.stages, R.blocks>;
      if (!has_code(kernel)) return cudaErrorNotSupported;
      return for_each_launch(p, [&](const AppendCall& call, int64_t entries) {
        const int64_t starts = call.packed ? Starts::bytes(call.sequences) : 0;
        const BulkParts parts = bulk_parts<T, R>(call, entries, device, starts);
        if (parts.stages == 0) return cudaErrorNotSupported;
        const int64_t bytes = int64_t{kWarps} * parts.stages * parts.stage_bytes() + starts;
        return launch(kernel, entries * parts.chunks.value, kThreads, static_cast<size_t>(bytes), stream,
                      call, units, parts);
      });
    } else {
      return cudaErrorNotSupported;
    }
  });
}

}  // namespace jax_flash::append::inline JF_ARCH_NAMESPACE
