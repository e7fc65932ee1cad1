// Decode over latent pools with at most 16 query rows per chunk, which is bound by memory (sm_90a). Tiles
// must be finished quickly, so that copies to most stages are in flight. So two groups of four warps
// alternate in taking tiles:
//
//   S = Q Kᵀ       a warp has a quarter of the head dim; the four sums meet in shared memory
//   P = 2^(S − m)  every warp, all of it, in registers
//   O ← α O + P V  a warp has 128 of O's columns
//
// At the end of a segment the groups exchange halves of O.
#pragma once

#include <cstdint>

#include "cuda/decode/latent_load.cuh"
#include "cuda/decode/latent_softmax.cuh"
#include "cuda/hopper/pipeline.cuh"
#include "cuda/hopper/roles.cuh"
#include "cuda/registry.h"
#include "cuda/tile/fragments.cuh"

namespace jax_flash::decode {

// Takes the place of the tile of P: the parts of S, or of O, that warps exchange, in the order of the lanes.
template <int kWarps, int kColumnTiles>
struct LatentSums {
  float4 x[kWarps][kColumnTiles][32];
  static constexpr int kBytes = kWarps * kColumnTiles * 32 * sizeof(float4);
};

template <class C>
struct LatentFewShared : LatentTiles<C> {
  Softmax softmax[C::kGroups][C::kRows];  // of a segment, at its end
  BlockPipeline<1> sums_pipe[C::kGroups];

  __device__ __forceinline__ void init() {
    constexpr uint32_t kArrivals = C::kGroupWarps * ptx::kWarpArrivals;
    this->init_tiles(kArrivals);
    for (auto& pipe : sums_pipe) pipe.init(kArrivals, kArrivals);
    ptx::fence_barriers();
  }
};

// A row of csrc/kernels.def: M query rows of a KV head, and N keys per tile. kOptions: whether there are
// score options.
template <class T, Row R, bool kOptions>
struct LatentFewSm90 {
  using Element = T;
  static constexpr int kHeadDim = R.head_dim, kValueDim = R.value_dim, kRows = R.block_m, kTile = R.block_n;
  static constexpr int kStages = R.stages, kThreads = R.warps * 32;
  static constexpr int kGroups = 2, kGroupWarps = 4, kWarps = kGroups * kGroupWarps;
  static constexpr int kLoadWarps = R.warps - kWarps;
  using QTile = SharedTile<T, kRows, kHeadDim>;
  using KTile = SharedTile<T, kTile, kHeadDim>;
  using PTile = LatentSums<kWarps, kTile / 8>;
  using S = Accumulator<1, kTile / 8>;
  using O = Accumulator<1, kValueDim / kGroupWarps / 8>;
  using Score = DecodeScore<S, kOptions>;
  using Column = LatentColumn<kRows, kOptions>;
  using Shared = LatentFewShared<LatentFewSm90>;
  // Each stage belongs to one group, because a barrier's phases must be waited for one by one.
  static_assert(kStages % kGroups == 0);
  static_assert(kRows == 16 && kTile == 32 && kHeadDim % 64 == 0 && kThreads == 3 * kWarpgroup);
  static_assert(sizeof(Shared) <= latent::few_bytes(R) + latent::kStateBytes);
};

// The four warps of a group.
template <class C>
class LatentGroup {
 public:
  using T = typename C::Element;
  using Shared = typename C::Shared;
  using S = typename C::S;
  using O = typename C::O;

  __device__ __forceinline__ LatentGroup(const LatentCall& decode, Shared& memory, int32_t head, int number)
      : call(decode), shared(memory), kv_head(head), group(number) {}

  __device__ __forceinline__ void run() {
    uint32_t use = 0;
#pragma unroll 1
    for (uint32_t number = 0;; ++number) {
      shared.q_pipe.wait_full(number);
      const LatentSegment& segment = shared.segments[number % Shared::kSegments];
      if (uniform(segment.done)) return;
      attend(segment, number, use);
      use += segment.tile_end - segment.tile;
    }
  }

 private:
  static constexpr int kPanels = C::kHeadDim / 64;  // a warp multiplies one k step of each panel
  static constexpr int kShare = O::kColumnTiles / C::kGroups, kAtOnce = C::kTile / 8;
  using SegmentSoftmax = LatentSoftmax<C, S>;

  __device__ __forceinline__ static int warp() { return static_cast<int>(threadIdx.x % kWarpgroup / 32); }
  __device__ __forceinline__ float4 (&sums(int of_group, int of_warp) const)[C::kTile / 8][32] {
    return reinterpret_cast<typename C::PTile*>(shared.p)->x[of_group * C::kGroupWarps + of_warp];
  }
  __device__ __forceinline__ static void sync_consumers() { ptx::sync_group(1, C::kWarps * 32); }

  // Attends to the group's tiles of a segment, and finishes it.
  __device__ __forceinline__ void attend(const LatentSegment& segment, uint32_t number, uint32_t use) {
    const ColumnRows rows = rows_of(segment, call.group, kv_head);
    read_queries();
    shared.q_pipe.release(number);
    SegmentSoftmax softmax(segment, rows, 0);
    O o;
    o.clear();
    const int32_t begin = segment.tile, end = segment.tile_end;
#pragma unroll 1
    for (int32_t tile = begin + group; tile < end; tile += C::kGroups, ++sum) {
      const uint32_t own = use + (tile - begin);
      const uint32_t k = ptx::shared_address(shared.k[own % C::kStages]);
      const ListedTile seen = listed_tile<C::kTile, C::Column::kSkips>(call, segment.work.list, tile);
      shared.k_pipe.wait_full(own);
      S s;
      multiply_keys(s, k);
      add_sums(s);
      softmax.score(
          s, DecodeTile<S>{call, rows, segment.work, seen.number * C::kTile, call.scale, 0, seen.pieces != 0},
          shared.missing[own % C::kStages]);
      float alpha[S::kSlots];
      if (call.row_max) raise_row_maxima(call, rows, segment.work, 0, s);
      if (softmax.update(s, alpha)) {
#pragma unroll
        for (int slot = 0; slot < S::kSlots; ++slot) o.scale_row(slot, alpha[slot]);
      }
      multiply_add<T, C::kTile / 16>(o, RegistersA<T, S>{s},
                                     ColumnsB<typename C::KTile, 16>(k, 128 * warp()));
      shared.k_pipe.release(own);
    }
    softmax.sum();
    finish(segment, rows, softmax, o);
  }

  // Reads this warp's share of Q: one k step of each panel.
  __device__ __forceinline__ void read_queries() {
    RowsA<typename C::QTile> rows(ptx::shared_address(shared.q), 0);
    rows.lane.swizzle ^= warp() << 5;
#pragma unroll
    for (int i = 0; i < kPanels; ++i) rows.load(q[i], 0, 4 * i);
  }

  __device__ __forceinline__ void multiply_keys(S& s, uint32_t tile) const {
    RowsB<typename C::KTile> keys(tile, 0);
    keys.lane.swizzle ^= warp() << 5;
    s.clear();
#pragma unroll
    for (int i = 0; i < kPanels; ++i) {
#pragma unroll
      for (int n = 0; n < S::kColumnTiles; n += 2) {
        uint32_t b[4];
        keys.load(b, n, 4 * i);
        ptx::mma<T>(s.x[0][n], q[i], b[0], b[1]);
        ptx::mma<T>(s.x[0][n + 1], q[i], b[2], b[3]);
      }
    }
  }

  // Adds up S over the head dim. All warps of the group get the same bits.
  __device__ __forceinline__ void add_sums(S& s) {
    auto& pipe = shared.sums_pipe[group];
    const int lane = lane_id();
    pipe.wait_empty(sum);
#pragma unroll
    for (int n = 0; n < S::kColumnTiles; ++n) sums(group, warp())[n][lane] = four(s.x[0][n]);
    pipe.arrive_by_warp(sum);
    pipe.wait_full(sum);
#pragma unroll
    for (int n = 0; n < S::kColumnTiles; ++n) {
      const float4 a = sums(group, 0)[n][lane], b = sums(group, 1)[n][lane];
      const float4 c = sums(group, 2)[n][lane], d = sums(group, 3)[n][lane];
      float (&x)[4] = s.x[0][n];
      x[0] = (a.x + b.x) + (c.x + d.x), x[1] = (a.y + b.y) + (c.y + d.y);
      x[2] = (a.z + b.z) + (c.z + d.z), x[3] = (a.w + b.w) + (c.w + d.w);
    }
    pipe.release(sum);
  }
  __device__ __forceinline__ static float4 four(const float (&x)[4]) {
    return make_float4(x[0], x[1], x[2], x[3]);
  }

  // Writes the results of a segment, or of a part of one.
  __device__ __forceinline__ void finish(const LatentSegment& segment, const ColumnRows& rows,
                                         const SegmentSoftmax& softmax, O& o) {
    Softmax all[O::kSlots];
    merge_groups(softmax, o, all);
    const Parts parts = segment.parts;
    const PartialResults<C::kRows> partial(call);
    const int64_t first = parts.count == 1 ? 0 : partial.row(parts.slot(call.grid, parts.own), kv_head, 0);
#pragma unroll
    for (int slot = 0; slot < O::kSlots; ++slot) {
      const int32_t row = O::row(slot);
      if (row >= rows.count() || !is_written(call, rows, segment.work, row)) continue;
      if (parts.count == 1) {
        store_row(segment.work, rows, row, slot, o, all[slot]);
      } else {
        store_partial(partial, first + row, slot, o, all[slot]);
      }
    }
    sync_consumers();  // waits until sums are read
  }

  // The first kShare column tiles of O ← this group's share of both groups' O, with the softmax of both.
  __device__ __forceinline__ void merge_groups(const SegmentSoftmax& softmax, O& o,
                                               Softmax (&all)[O::kSlots]) const {
    if (warp() == 0 && threadIdx.x % 4 == 0) {
#pragma unroll
      for (int slot = 0; slot < O::kSlots; ++slot)
        shared.softmax[group][O::row(slot)] = {softmax.m[slot], softmax.l[slot]};
    }
    shared.sums_pipe[group].wait_empty(sum);  // the group has read its last sums
    float factor[O::kSlots], other[O::kSlots];
    const int lane = lane_id();
#pragma unroll
    for (int first = 0; first < kShare; first += kAtOnce) {
      if (first > 0) sync_consumers();
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        const float4 low = four(o.x[0][first + n]), high = four(o.x[0][kShare + first + n]);
        sums(group, warp())[n][lane] = group == 0 ? high : low;
      }
      sync_consumers();
      if (first == 0) {
#pragma unroll
        for (int slot = 0; slot < O::kSlots; ++slot) {
          const Softmax mine{softmax.m[slot], softmax.l[slot]};
          const Softmax theirs = shared.softmax[1 - group][O::row(slot)];
          const float m = fmaxf(mine.m, theirs.m);
          factor[slot] = merge_weight(mine, m), other[slot] = merge_weight(theirs, m);
          all[slot] = {m, mine.l * factor[slot] + theirs.l * other[slot]};
        }
      }
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        const float4 theirs = sums(1 - group, warp())[n][lane];
        const float x[4] = {theirs.x, theirs.y, theirs.z, theirs.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float mine = group == 0 ? o.x[0][first + n][i] : o.x[0][kShare + first + n][i];
          o.x[0][first + n][i] = mine * factor[i / 2] + x[i] * other[i / 2];
        }
      }
    }
  }
  // The feature of this thread's n-th pair in the group's share.
  __device__ __forceinline__ int32_t feature(int n) const {
    return 128 * warp() + 8 * kShare * group + O::column(n);
  }

  __device__ __forceinline__ void store_row(const SequenceWork& work, const ColumnRows& rows, int32_t row,
                                            int slot, const O& o, Softmax all) const {
    const int32_t head = rows.head(row), i = rows.position(row);
    const auto [factor, lse] = finish_row(call, work, head, i, all);
    T* const to = call.out.at<T>(work.leading, work.batch_row, head, work.q_begin + i);
    const bool zero = factor == 0;
#pragma unroll
    for (int n = 0; n < kShare; ++n) {
      if (feature(n) < call.value_dim)
        ptx::store_pair(to + feature(n), zero ? 0 : o.at(slot, n, 0) * factor,
                        zero ? 0 : o.at(slot, n, 1) * factor);
    }
    if (threadIdx.x < 32 && threadIdx.x % 4 == 0)
      store_lse(call, work.leading, work.batch_row, head, work.q_begin + i, lse);
  }

  __device__ __forceinline__ void store_partial(const PartialResults<C::kRows>& partial, int64_t row,
                                                int slot, const O& o, Softmax all) const {
    float* const to = partial.o + row * partial.width;
#pragma unroll
    for (int n = 0; n < kShare; ++n) {
      if (feature(n) < call.value_dim)
        *reinterpret_cast<float2*>(to + feature(n)) = make_float2(o.at(slot, n, 0), o.at(slot, n, 1));
    }
    if (threadIdx.x < 32 && threadIdx.x % 4 == 0) partial.softmax[row] = all;
  }

  const LatentCall& call;
  Shared& shared;
  int32_t kv_head;
  int group;
  uint32_t sum = 0;        // the number of tiles that the group has attended to
  uint32_t q[kPanels][4];  // fragments
};

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1) latent_few_sm90(const __grid_constant__ LatentCall call) {
  auto& shared = *reinterpret_cast<typename C::Shared*>(ptx::dynamic_shared_1024());
  constexpr int kConsumerRegisters = 208, kProducerRegisters = 88;
  static_assert(C::kGroups * kConsumerRegisters + kProducerRegisters <= 3 * 168);
  run_latent<C>(call, shared, [&](int32_t kv_head, LatentLoader<C> loader) {
    const int warpgroup = warpgroup_index();
    if (warpgroup == C::kGroups) {
      ptx::give_registers<kProducerRegisters>();
      loader.run();
    } else {
      ptx::take_registers<kConsumerRegisters>();
      LatentGroup<C>(call, shared, kv_head, warpgroup).run();
    }
  });
}

}  // namespace jax_flash::decode
