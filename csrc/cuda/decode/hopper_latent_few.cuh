// The consumer warpgroups of cuda/decode/hopper.cuh where there are at most 16 query rows, so that loading
// the keys takes longer than their products.
//
// The products are transposed, Sᵀ = K Qᵀ [64, rows] and Oᵀ += Vᵀ Pᵀ [dv, rows]: the rows are the N of wgmma.
// Each warpgroup has tiles of keys to itself, every other one, and O of them, which are merged where a
// segment ends.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/decode/hopper_latent_consumer.cuh"
#include "cuda/decode/warp_attention.cuh"

namespace jax_flash::decode {

template <class C>
class LatentFewConsumer {
 public:
  using T = typename C::Element;
  using Shared = typename C::Shared;
  using S = TransposedAccumulator<1, C::kRows / 8>;  // of a warp's 16 keys

  __device__ __forceinline__ LatentFewConsumer(const LatentCall& decode, Shared& memory, int32_t head,
                                               int number)
      : call(decode), shared(memory), kv_head(head), warpgroup(number) {}

  __device__ __forceinline__ void run() {
    uint32_t use = 0;
#pragma unroll 1
    for (uint32_t number = 0;; ++number) {
      shared.q_pipe.wait_full(number);
      const LatentSegment& segment = shared.segments[number % Shared::kSegments];
      if (uniform(segment.done)) return;
      attend(segment, number, use);
      finish(segment);
      use += segment.tile_end - segment.tile;
    }
  }

 private:
  static constexpr int kRowTiles = C::kRows / 8, kFeatureTiles = C::kValueDim / 64, kPairs = C::kTile / 16;
  static constexpr float kSlack = 8;  // O is rescaled where a score exceeds the row's bound by more

  __device__ __forceinline__ static int warp() { return ptx::thread_index() % kWarpgroup / 32; }
  __device__ __forceinline__ static int group() {
    return lane_id() / 4;
  }  // of the lane: its key, its feature
  __device__ __forceinline__ void sync() const { ptx::sync_group(2 + warpgroup, kWarpgroup); }
  __device__ __forceinline__ static void sync_all() { ptx::sync_group(1, Shared::kConsumers * kWarpgroup); }
  __device__ __forceinline__ ColumnRows rows_of(const LatentSegment& segment) const {
    return {call.group, kv_head, segment.first_row, segment.end_row};
  }

  // O, m and l of this warpgroup's tiles of a segment that begins with tile number `first`.
  __device__ __forceinline__ void attend(const LatentSegment& segment, uint32_t number, uint32_t first) {
    const ColumnRows rows = rows_of(segment);
    if (threadIdx.x == 0 && segment.parts.count > 1)
      prepare_counter(PartialResults<C::kRows>(call).counter(segment.parts, kv_head));
    Interval seen[S::kSlots];  // the keys that a row sees
#pragma unroll
    for (int slot = 0; slot < S::kSlots; ++slot) {
      const int32_t row = S::row(slot);
      seen[slot] = row < rows.count() ? segment.work.band.row(rows.position(row)) : Interval{0, 0};
      m[slot] = -INFINITY, l[slot] = 0;
    }
    clear_fragments(o);
    const Interval common = segment.work.band.common(rows.first_position(), segment.work.end_position(rows));
    const uint32_t end = first + static_cast<uint32_t>(segment.tile_end - segment.tile);
#pragma unroll 1
    for (uint32_t use = first + ((first ^ static_cast<uint32_t>(warpgroup)) & 1); use < end; use += 2) {
      const int32_t key = (segment.tile + static_cast<int32_t>(use - first)) * C::kTile + 16 * warp();
      shared.k_pipe.wait_full(use);
      ptx::fence_async_shared();  // the copies were made by cp.async
      multiply_keys(use);
      set_missing(use);
      typename C::Score().apply(s, DecodeTile<S>{call, rows, segment.work, key, call.scale});
      if (key < common.lo || key + 16 > common.hi) {
        hide(s, key, -INFINITY, [&](int slot) { return seen[slot].lo; }, BeforeLimit{});
        hide(s, key, -INFINITY, [&](int slot) { return seen[slot].hi; }, FromLimit{});
      }
      raise_bounds();
      store_weights();
      multiply_values(use);
      shared.k_pipe.release(use);
    }
    shared.q_pipe.release(number);
  }

  // Sᵀ = K Qᵀ
  __device__ __forceinline__ void multiply_keys(uint32_t use) {
    using Product = ptx::Wgmma<T, C::kRows>;
    const RowsDescriptor<typename C::KTile> k(ptx::here(ptx::shared_address(shared.k[use % C::kStages])));
    const RowsDescriptor<typename C::QTile> q(ptx::here(ptx::shared_address(shared.q)));
    ptx::wgmma_fence();
    Product::template multiply<true>(s.x[0], k.at(0), q.at(0));
#pragma unroll
    for (int step = 1; step < C::kHeadDim / 16; ++step)
      Product::template multiply<false>(s.x[0], k.at(step), q.at(step));
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::hold(s.x[0]);
  }

  // Oᵀ ← Oᵀ + Vᵀ Pᵀ
  __device__ __forceinline__ void multiply_values(uint32_t use) {
    using VTile = SharedTile<T, C::kTile, 64>;
    const uint32_t k = ptx::here(ptx::shared_address(shared.k[use % C::kStages]));
    const RowsDescriptor<typename C::PTile> p(ptx::shared_address(shared.p[warpgroup]));
#pragma unroll
    for (int i = 0; i < kFeatureTiles; ++i) ptx::hold(o[i]);
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < kFeatureTiles; ++i) {
      const ColumnsDescriptor<VTile> v(k + C::KTile::panel_offset(i * C::KTile::kPanel));
#pragma unroll
      for (int step = 0; step < kPairs; ++step)
        ptx::Wgmma<T, C::kRows>::template multiply<false, 1>(o[i], v.at(step), p.at(step));
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < kFeatureTiles; ++i) ptx::hold(o[i]);
  }

  // S of keys on pages outside the pool becomes NaN; their elements are zeros.
  __device__ __forceinline__ void set_missing(uint32_t use) {
    const uint32_t missing = shared.missing[use % C::kStages][warp()];
    if (missing == 0) return;
    for_each(s, [&](float& x, int, int, int e) {
      if (missing >> (8 * e + group()) & 1) x = NAN;
    });
  }

  // m ← the row's bound, raised where a score exceeds it by more than kSlack; O ← α O, l ← α l. Each row
  // decides for itself, so that its bits depend on no other row.
  __device__ __forceinline__ void raise_bounds() {
    float (&maxima)[kConsumerWarps][C::kRows] = shared.maxima[warpgroup];
#pragma unroll
    for (int slot = 0; slot < S::kSlots; ++slot) {
      const float top = column_max(fmaxf(s.at(slot, 0, 0), s.at(slot, 0, 1)));
      if (group() == 0) maxima[warp()][S::row(slot)] = top;
    }
    sync();  // and all warps' products of the tile before have read P
    float alpha[S::kSlots];
    bool raised = false;
#pragma unroll
    for (int slot = 0; slot < S::kSlots; ++slot) {
      float top = maxima[0][S::row(slot)];
#pragma unroll
      for (int w = 1; w < kConsumerWarps; ++w) top = fmaxf(top, maxima[w][S::row(slot)]);
      alpha[slot] = 1;
      if (top > m[slot] + kSlack) {
        alpha[slot] = ptx::exp2(m[slot] - top);
        m[slot] = top, raised = true;
        l[slot] *= alpha[slot];
      }
    }
    if (!__any_sync(~0u, raised)) return;
#pragma unroll
    for (int i = 0; i < kFeatureTiles; ++i)
#pragma unroll
      for (int n = 0; n < kRowTiles; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) o[i][n][e] *= alpha[2 * n + e % 2];
  }

  // P = 2^(S − m), to shared memory; l ← l + Σ P over this thread's keys.
  __device__ __forceinline__ void store_weights() {
    uint8_t* const p = shared.p[warpgroup];
    for_each(s, [&](float& x, int slot, int, int e) {
      x = ptx::exp2(x - (m[slot] == -INFINITY ? 0 : m[slot]));  // no key was seen yet: P must be 0, not NaN
      l[slot] += x;
      const int offset =
          C::PTile::offset(S::row(slot), 2 * warp() + e) + group() * static_cast<int>(sizeof(T));
      *reinterpret_cast<T*>(p + offset) = T(x);
    });
    ptx::fence_async_shared();
    sync();
  }

  // Merges the results of both warpgroups, and writes them, or merges them with those of the entry's other
  // parts if this one is the last to be finished.
  __device__ __forceinline__ void finish(const LatentSegment& segment) {
    const ColumnRows rows = rows_of(segment);
    const Parts parts = segment.parts;
    const PartialResults<C::kRows> partial(call);
    const int64_t first = parts.count == 1 ? 0 : partial.row(parts.slot(call.grid, parts.own), kv_head, 0);
    share_softmax();
    float factor[S::kSlots];
#pragma unroll
    for (int slot = 0; slot < S::kSlots; ++slot)
      factor[slot] = merge_weight(softmax_of(warpgroup, S::row(slot)), merged(S::row(slot)).m);
    if (warpgroup == 1) for_each_feature([&](float& to, float x, int slot) { to = x * factor[slot]; });
    sync_all();
    if (warpgroup == 0)
      for_each_feature([&](float& to, float x, int slot) { to = fmaf(x, factor[slot], to); });
    sync_all();
    constexpr int kChunks = C::kValueDim / 4;
    for (int at = static_cast<int>(threadIdx.x); at < rows.count() * kChunks;
         at += Shared::kConsumers * kWarpgroup) {
      const int row = at / kChunks, feature = at % kChunks * 4;
      if (feature >= call.value_dim || !is_written(call, rows, segment.work, row)) continue;
      const float4 x = *reinterpret_cast<const float4*>(&shared.o[row][feature]);
      if (parts.count == 1) {
        store_result<T>(call, rows, segment.work, row, feature, x, merged(row));
      } else {
        *reinterpret_cast<float4*>(partial.o + (first + row) * partial.width + feature) = x;
        if (feature == 0) partial.softmax[first + row] = merged(row);
      }
    }
    sync_all();  // what is shared is read, and results are stored
    if (parts.count == 1) return;
    if (threadIdx.x == 0) shared.is_last = count_part(partial.counter(parts, kv_head), parts.count);
    sync_all();
    if (shared.is_last) combine<C>(call, rows, segment.work, partial, parts, kv_head);
  }

  // Stores m, and l of each warp's keys.
  __device__ __forceinline__ void share_softmax() {
#pragma unroll
    for (int slot = 0; slot < S::kSlots; ++slot) {
      const float sum = column_sum(l[slot]);
      if (group() != 0) continue;
      shared.sums[warpgroup][warp()][S::row(slot)] = sum;
      if (warp() == 0) shared.bounds[warpgroup][S::row(slot)] = m[slot];
    }
    sync_all();
  }
  __device__ __forceinline__ Softmax softmax_of(int of, int row) const {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kConsumerWarps; ++w) sum += shared.sums[of][w][row];
    return {shared.bounds[of][row], sum};
  }
  __device__ __forceinline__ Softmax merged(int row) const {
    const Softmax a = softmax_of(0, row), b = softmax_of(1, row);
    const float bound = fmaxf(a.m, b.m);
    return {bound, a.l * merge_weight(a, bound) + b.l * merge_weight(b, bound)};
  }

  // Calls f(shared O, this thread's O, slot) for each element of O that this thread has.
  template <class F>
  __device__ __forceinline__ void for_each_feature(F f) {
#pragma unroll
    for (int i = 0; i < kFeatureTiles; ++i)
#pragma unroll
      for (int n = 0; n < kRowTiles; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int slot = 2 * n + e % 2, feature = 64 * i + 16 * warp() + 8 * (e / 2) + group();
          f(shared.o[S::row(slot)][feature], o[i][n][e], slot);
        }
  }

  const LatentCall& call;
  Shared& shared;
  int32_t kv_head;
  int warpgroup;
  S s;
  float o[kFeatureTiles][kRowTiles][4];  // Oᵀ
  float m[S::kSlots], l[S::kSlots];      // the bound on a row's scores, and this thread's share of Σ P
};

}  // namespace jax_flash::decode
