// Decode of few sequences on sm_90a. A column of a sequence is one cluster of n CTAs, which merge their
// results through distributed shared memory. (The portable kernel writes them to global memory, counts them
// and reads them again.) No partition is computed, so the code before the first copy is short.
//
//   tiles rank, rank + n, … of the sequence, each warp alone, as in portable.cuh
//   the warps' results are merged, and sent item by item to the n CTAs in turn (st.async)
//   each CTA waits for the n parts of its items, merges them and writes o and lse
#pragma once

#include "core/families/decode_clusters.h"
#include "cuda/decode/shares.cuh"
#include "cuda/launch.h"
#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/dependent.cuh"

namespace jax_flash::decode {

// A row of csrc/kernels.def: M query rows of a KV head, and N keys per tile of a CTA.
template <class T, Row R>
struct DecodeSm90 {
  using Element = T;
  static constexpr int kHeadDim = R.head_dim, kValueDim = R.value_dim, kRows = R.block_m;
  static constexpr int kWarps = R.warps, kThreads = kWarps * 32, kBlocks = R.blocks;
  static constexpr int kTile = R.block_n, kKeys = kTile / kWarps, kStages = R.stages;
  using KTile = StoredTile<T, kKeys, kHeadDim>;
  using VTile = StoredTile<T, kKeys, kValueDim>;
  static constexpr int kStageBytes = KTile::kBytes + VTile::kBytes;
  using Score = DecodeScore<TransposedAccumulator<kKeys / 16, kRows / 8>, false>;
  using WarpState = WarpAttention<T, T, kHeadDim, kValueDim, kKeys, kRows / 8, kWarps, Score, false>;
  static constexpr clusters::Layout kLayout = clusters::layout(R, sizeof(T));
  static constexpr int kMergeColumns = kValueDim, kMergePitch = kMergeColumns + 4;
  using Shares = DecodeShares<T, T, R, false, false>;
  static constexpr int kSharedBytes = kLayout.bytes, kChunks = kValueDim / 4;
  static_assert(kWarps * kRows * kMergePitch * 4 <= kWarps * kLayout.warp_ring);
  static_assert(!WarpState::kSharedQueries && kChunks >= clusters::kMostCtas);
};

// Copies a warp's keys in every n-th tile of a sequence. kAhead, for many tiles: each lane also copies the
// table entry of its key kStages tiles before the key, so that nobody waits for it. A lookup takes longer
// than a tile if an SM has one CTA.
template <class C, bool kAhead>
class ClusterRing {
 public:
  // The pages of the first keys, for sequences that are seen from their first key on. They are looked up
  // while the lengths are read.
  struct Pages {
    int32_t first = 0;

    __device__ __forceinline__ Pages(uint8_t* shared, const DecodeCall& call, int32_t number, int32_t rank,
                                     int32_t ctas) {
      if (!call.paged) return;
      const int32_t leading = call.sequences == call.batch.value ? 0 : call.batch.quotient(number);
      const int32_t index = number - leading * call.batch.value;
      const auto* const table = call.block_tables.at<const int32_t>(leading, index, 0, 0);
#pragma unroll
      for (int i = 0; i < (kAhead ? C::kStages : 1); ++i) {
        const int32_t key = (rank + i * ctas) * C::kTile + key_in_tile();
        if (key >= call.k_rows) break;
        const int32_t* const entry = table + call.page_size.quotient(key);
        if constexpr (kAhead) {
          ptx::cp_async_4(ptx::shared_address(shared) + place(i), entry, true);
        } else {
          first = *entry;
        }
      }
    }
  };

  __device__ __forceinline__ ClusterRing(uint8_t* shared, const DecodeCall& decode, const ColumnRows& rows,
                                         int32_t number, int32_t rank, int32_t ctas, Pages pages)
      : call(decode), keys(decode), memory(ptx::shared_address(shared)), step(ctas) {
    work = rows.sequence(call, number);
    keys.open(call, rows, work);
    const Interval tiles = tiles_of(work.keys, C::kTile);
    tile = tiles.lo + rank, end = tiles.hi;
    if constexpr (kAhead) {  // also waits until the first entries have arrived
      if (call.paged && tiles.lo > 0) {
        for (int i = 0; i < C::kStages; ++i) ask(tile + i * step, i);
        ptx::cp_async_commit();
        ptx::cp_async_wait<0>();
      }
    } else if (call.paged && tiles.lo == 0) {
      next = keys.locate(call, key_of(tile), [&](int32_t) { return pages.first; });
    } else {
      find();
    }
  }

  __device__ __forceinline__ static int32_t warp() { return static_cast<int32_t>(threadIdx.x) / 32; }
  __device__ __forceinline__ void fill() {
    if (tile < end) {
      if constexpr (kAhead)
        next = keys.locate(call, key_of(tile), [&](int32_t) {
          return static_cast<int32_t>(ptx::load_shared(memory + place(filled)));
        });
      copy_rows<typename C::KTile, typename C::VTile>(
          memory + warp() * C::kLayout.warp_ring + filled * C::kStageBytes, keys, keys.check(call, next));
      if constexpr (kAhead) ask(tile + C::kStages * step, filled);
      tile += step;
      if (!kAhead && tile < end) find();
    }
    if (++filled == C::kStages) filled = 0;
    ptx::cp_async_commit();
  }
  // Waits for the oldest of kStages copies, and returns the address of the keys and their values.
  __device__ __forceinline__ uint32_t wait() const {
    ptx::cp_async_wait<C::kStages - 1>();
    __syncwarp();
    return memory + warp() * C::kLayout.warp_ring + filled * C::kStageBytes;
  }

  SequenceWork work;
  int32_t tile, end;  // the tile that is copied next; the end of the tiles

 private:
  __device__ __forceinline__ static int32_t key_in_tile() {
    return warp() * C::kKeys + static_cast<int32_t>(threadIdx.x) % C::kKeys;
  }
  __device__ __forceinline__ static int64_t key_of(int32_t of_tile) {
    return int64_t{of_tile} * C::kTile + key_in_tile();
  }
  // The shared-memory offset of this lane's table entry for a stage.
  __device__ __forceinline__ static uint32_t place(int stage) {
    return C::kLayout.entries + (stage * C::kThreads + threadIdx.x) * 4;
  }
  __device__ __forceinline__ void find() { next = keys.look_up(call, key_of(tile)); }
  __device__ __forceinline__ void ask(int32_t of_tile, int stage) const {
    const int64_t key = key_of(of_tile);
    if (call.paged && key < keys.used.hi)
      ptx::cp_async_4(memory + place(stage), keys.table + call.page_size.quotient(static_cast<int32_t>(key)),
                      true);
  }

  const DecodeCall& call;
  KeySource<typename C::Element, true> keys;
  uint32_t memory;
  int32_t step;
  PageSlot next;  // the page of this lane's key in that tile, not yet checked
  int filled = 0;
};

// The exchange of parts between the n CTAs of a cluster, a power of two. Item i, four features of a row, is
// merged by CTA i % n.
template <class C>
struct Exchange {
  uint8_t* shared;
  uint32_t rank, ctas;
  int log_ctas;

  __device__ __forceinline__ uint32_t address(int32_t offset) const {
    return ptx::shared_address(shared) + offset;
  }
  // All threads must call this before send() and wait().
  __device__ __forceinline__ void start() const {
    if (threadIdx.x == 0) {
      ptx::barrier_init(address(C::kLayout.barrier), 1);
      ptx::fence_barriers();
    }
    __syncwarp();
    ptx::arrive_at_cluster();
  }
  __device__ __forceinline__ void wait(int32_t rows) const {
    ptx::wait_for_cluster();
    if (threadIdx.x == 0)
      ptx::barrier_expect(address(C::kLayout.barrier), rows * (C::kChunks * 16 + ctas * 8));
  }
  __device__ __forceinline__ void send(int32_t row, int32_t feature, const float4& o, Softmax softmax) const {
    const uint32_t chunk = feature / 4, item = row * C::kChunks + chunk, to = item & (ctas - 1);
    const uint32_t barrier = address(C::kLayout.barrier);
    ptx::store_in(address(C::kLayout.parts) + (item - to + rank) * 16, o, barrier, to);
    if (chunk < ctas)
      ptx::store_in(address(C::kLayout.softmax) + ((row << log_ctas) + rank) * 8,
                    make_float2(softmax.m, softmax.l), barrier, chunk);
  }
  // Calls write(row, feature, O of four features, softmax of the row) for this CTA's items.
  template <class Write>
  __device__ __forceinline__ void receive(int32_t rows, Write write) const {
    ptx::barrier_wait(address(C::kLayout.barrier), 0);
    const auto* const parts = reinterpret_cast<const float4*>(shared + C::kLayout.parts);
    const auto* const softmax = reinterpret_cast<const Softmax*>(shared + C::kLayout.softmax);
    const int32_t all_parts = rows * C::kChunks;
#pragma unroll 1
    for (int32_t first = 0; first < all_parts; first += C::kThreads) {
      const int32_t at = min(first + static_cast<int32_t>(threadIdx.x), all_parts - 1);
      const uint32_t part = at & (ctas - 1), item = at - part + rank;
      const int32_t row = item / C::kChunks, feature = item % C::kChunks * 4;
      const Softmax own = softmax[(row << log_ctas) + part];
      float4 o = parts[at];
      Softmax all = own;
      for (uint32_t step = 1; step < ctas; step *= 2) all.m = fmaxf(all.m, __shfl_xor_sync(~0u, all.m, step));
      const float weight = merge_weight(own, all.m);
      all.l *= weight, o.x *= weight, o.y *= weight, o.z *= weight, o.w *= weight;
      for (uint32_t step = 1; step < ctas; step *= 2) {
        all.l += __shfl_xor_sync(~0u, all.l, step);
        o.x += __shfl_xor_sync(~0u, o.x, step), o.y += __shfl_xor_sync(~0u, o.y, step);
        o.z += __shfl_xor_sync(~0u, o.z, step), o.w += __shfl_xor_sync(~0u, o.w, step);
      }
      if (part == 0 && first + static_cast<int32_t>(threadIdx.x) < all_parts) write(row, feature, o, all);
    }
  }
};

// Whether all sequences have about as many keys as the first one. All threads of a CTA must call this. It
// compares only the lengths, because code that runs once has to be fetched from memory. If operands move the
// band, it compares the numbers of keys that the rows see, which must also be few for clusters of several
// CTAs.
template <class C, bool kPacked>
__device__ __forceinline__ bool are_even(const DecodeCall& call, int log_ctas) {
  constexpr int32_t kPart = 32;  // lengths may differ by 1 / kPart of the first one
  const auto length_of = [&](int32_t number) {
    SequenceWork work;
    work.leading = call.sequences == call.batch.value ? 0 : call.batch.quotient(number);
    work.index = number - work.leading * call.batch.value;
    int32_t length = call.k_rows;
    if (call.kv_lengths)
      length = clamp_index(*call.kv_lengths.at<const int32_t>(work.leading, work.index, 0, 0), length);
    if (!call.moves_band) return length;
    const int32_t tokens = kPacked ? 1 : call.q_rows;
    work.band = {tokens, length, call.bottom_right ? length - tokens : 0, call.left, call.right};
    work.move_band(call);
    return work.band.rows(0, tokens).size();
  };
  // Each warp looks at all of them, so that all loads start at once and no warp waits for another.
  const int32_t sequences = call.compared;
  const auto lane = static_cast<int32_t>(threadIdx.x % 32);
  int32_t first = 0;
  bool even = true;
#pragma unroll 1
  for (int32_t i = 0; i < sequences; i += 32) {
    const int32_t own = length_of(min(i + lane, sequences - 1));
    if (i == 0) first = __shfl_sync(~0u, own, 0);
    even &= abs(own - first) <= first / kPart;
  }
  if (call.moves_band && log_ctas > 0) even &= first <= (clusters::kMostTiles * C::kTile << log_ctas);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  if (__all_sync(~0u, even)) return true;
  __syncthreads();  // the code for equal shares uses the entries' memory
  return false;
}

// kShares: only the device knows the lengths. If they differ, the CTAs take equal shares of all keys, and
// there may be more CTAs than the clusters need. kPacked: the sequences are packed, and the forward runs some
// of them.
template <class C, bool kShares, bool kPacked>
__device__ __forceinline__ void attend_in_clusters(const DecodeCall& call, int log_ctas) {
  uint8_t* const shared = ptx::dynamic_shared();
  const int32_t ctas = 1 << log_ctas, rank = static_cast<int32_t>(blockIdx.x) & (ctas - 1);
  const int32_t unit = static_cast<int32_t>(blockIdx.x) >> log_ctas;
  const int32_t own = call.columns.quotient(unit), column = unit - own * call.columns.value;
  const ColumnRows rows = ColumnRows::of_column(call, column, C::kRows);
  const Exchange<C> exchange{shared, static_cast<uint32_t>(rank), static_cast<uint32_t>(ctas), log_ctas};
  const int32_t number = kShares ? min(own, call.sequences - 1) : own;
  using Ring = ClusterRing<C, kShares>;
  const typename Ring::Pages pages(shared, call, number, rank, ctas);
  if constexpr (kShares) {
    if (!are_even<C, kPacked>(call, log_ctas)) return attend_share<typename C::Shares>(call);
    if (own != number) return;
  }
  Ring ring(shared, call, rows, number, rank, ctas, pages);
  const SequenceWork& work = ring.work;
  if (kPacked && !work.served()) return;
  typename C::WarpState state;
  int32_t tile = ring.tile;
#pragma unroll 1  // short code, because a kernel's first instructions are fetched from memory
  for (int ahead = -C::kStages;;) {
    ring.fill();
    if (++ahead < 0) continue;
    if (ahead == 0) {
      if (ctas > 1) exchange.start();
      state.load(call, rows, work);
      state.begin(call, rows, work);
    }
    if (tile >= ring.end) break;
    const int32_t key = tile * C::kTile + ring.warp() * C::kKeys;
    const uint32_t k = ring.wait();
    if (key < work.keys.hi && key + C::kKeys > work.keys.lo)
      state.step(call, rows, work, key, k, k + C::KTile::kBytes);
    __syncwarp();
    tile += ctas;
  }
  const auto write = [&](int32_t row, int32_t feature, const float4& o, Softmax softmax) {
    if (feature < call.value_dim && is_written(call, rows, work, row))
      store_result<typename C::Element>(call, rows, work, row, feature, o, softmax);
  };
  if (ctas > 1) exchange.wait(rows.count());
  WarpMerge<C>(shared).run(state, rows.count(), [&](int32_t row, int32_t feature, float4 o, Softmax softmax) {
    if (ctas == 1) return write(row, feature, o, softmax);
    exchange.send(row, feature, o, softmax);
  });
  if (ctas > 1) exchange.receive(rows.count(), write);
}

// Calls without packed sequences have a kernel of their own, since each instruction of a short call counts.
template <class C, bool kShares, bool kPacked>
__global__ void __launch_bounds__(C::kThreads, C::kBlocks)
    decode_sm90(const __grid_constant__ DecodeCall call, int log_ctas) {
  if constexpr (kPacked) {
    ptx::let_next_kernel_start();  // the forward, for sequences with more rows
    if (are_in_order(call)) attend_in_clusters<C, kShares, true>(call, log_ctas);
    ptx::wait_for_kernel_before();  // the forward waits for this kernel alone, and reads the schedule
  } else {
    attend_in_clusters<C, kShares, false>(call, log_ctas);
  }
}

template <class C>
cudaError_t launch_in_clusters(const Problem& p, const LaunchPlan& plan, void* workspace,
                               cudaStream_t stream) {
  const bool shares = plan.decode.memory >= 0;
  const int64_t entries = p.leading.count() * p.batch;
  const auto ctas = static_cast<int32_t>(shares ? plan.decode.ranges / entries : plan.decode.ranges);
  const auto kernel = p.packed() ? (shares ? decode_sm90<C, true, true> : decode_sm90<C, false, true>)
                                 : (shares ? decode_sm90<C, true, false> : decode_sm90<C, false, false>);
  int log_ctas = 0;
  while (1 << log_ctas < ctas) ++log_ctas;
  if (ctas > 8) {
    const cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (e != cudaSuccess) return e;
  }
  for (int64_t outer = 0; outer < outer_entries(p.leading); ++outer) {
    const DecodeCall call = make_call<C::kTile>(p, plan.decode, C::kRows, outer, workspace);
    int64_t blocks = int64_t{call.sequences} * plan.decode.columns * ctas;
    if (shares) {
      const int64_t most = std::max(blocks, int64_t{plan.decode.ranges} * plan.decode.columns);
      blocks = ceil_div(most, ctas) * ctas;
    }
    const int32_t bytes = shares ? std::max(C::kSharedBytes, C::Shares::kSharedBytes) : C::kSharedBytes;
    const cudaError_t e = launch_early(p.packed() && outer == 0, kernel, static_cast<uint32_t>(ctas), blocks,
                                       C::kThreads, bytes, stream, call, log_ctas);
    if (e != cudaSuccess) return e;
  }
  return cudaSuccess;
}

}  // namespace jax_flash::decode
