// The consumer warpgroups of cuda/decode/hopper.cuh: each has half of O's columns; the first one computes S
// and P for both.
#pragma once

#include <cstdint>

#include "cuda/decode/hopper_latent_state.cuh"
#include "cuda/decode/latent_softmax.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/tile/descriptor.cuh"

namespace jax_flash::decode {

// kHalf: which columns of O this warpgroup has.
template <class C, int kHalf>
class LatentConsumer {
 public:
  using T = typename C::Element;
  using Shared = typename C::Shared;
  using S = Accumulator<1, C::kTile / 8>;
  using O = Accumulator<1, C::kValueDim / 16>;

  __device__ __forceinline__ LatentConsumer(const LatentCall& decode, Shared& memory, int32_t head)
      : call(decode), shared(memory), kv_head(head) {}

  __device__ __forceinline__ void run() {
    uint32_t use = 0;
#pragma unroll 1
    for (uint32_t number = 0;; ++number) {
      shared.q_pipe.wait_full(number);
      const LatentSegment& segment = shared.segments[number % Shared::kSegments];
      if (uniform(segment.done)) return;
      o.clear();
      if constexpr (kHalf == 0) {
        attend_first(segment, number, use);
      } else {
        attend_second(segment, number, use);
      }
      finish(segment, shared.softmax[number % Shared::kEnds]);
    }
  }

 private:
  static constexpr int kPairs = C::kTile / 16;  // P V takes a wgmma per pair of P's 8-column tiles

  // The first of the 16 rows that this warp has of the warpgroup's 64.
  __device__ __forceinline__ static int32_t first_row() { return ptx::thread_index() % kWarpgroup / 32 * 16; }

  // Computes S, P and this half of O over all tiles of a segment.
  __device__ __forceinline__ void attend_first(const LatentSegment& segment, uint32_t number, uint32_t& use) {
    const ColumnRows rows = rows_of(segment, call.group, kv_head);
    LatentSoftmax<C, S> softmax(segment, rows, first_row());
    const int32_t tile_end = segment.tile_end;
#pragma unroll 1
    for (int32_t tile = segment.tile; tile < tile_end; ++tile, ++use) {
      const ListedTile seen = listed_tile<C::kTile, C::Column::kSkips>(call, segment.work.list, tile);
      shared.k_pipe.wait_full(use);
      ptx::fence_async_shared();  // because cp.async made the copies
      multiply_keys(use);
      if (tile + 1 == tile_end) shared.q_pipe.release(number);
      softmax.score(s,
                    DecodeTile<S>{call, rows, segment.work, seen.number * C::kTile, call.scale, first_row(),
                                  seen.pieces != 0},
                    shared.missing[use % C::kStages]);
      float alpha[S::kSlots];
      if (call.row_max) raise_row_maxima(call, rows, segment.work, first_row(), s);
      const bool rescales = softmax.update(s, alpha);
      uint32_t p[kPairs][4];
      round(p);
      store_weights(use, p, alpha);
      if (rescales) {
#pragma unroll
        for (int slot = 0; slot < S::kSlots; ++slot) o.scale_row(slot, alpha[slot]);
      }
      ptx::hold(p);
      multiply_values(use, [&](int k) -> const uint32_t (&)[4] { return p[k]; });
      shared.k_pipe.release(use);
    }
    softmax.sum();
    if (threadIdx.x % 4 != 0) return;
#pragma unroll
    for (int slot = 0; slot < S::kSlots; ++slot)
      shared.softmax[number % Shared::kEnds][first_row() + S::row(slot)] = {softmax.m[slot], softmax.l[slot]};
  }

  // Computes this half of O over all tiles of a segment.
  __device__ __forceinline__ void attend_second(const LatentSegment& segment, uint32_t number,
                                                uint32_t& use) {
    shared.q_pipe.release(number);
    const RowsDescriptor<typename C::PTile> p(ptx::shared_address(shared.p));
#pragma unroll 1
    for (int32_t tile = segment.tile, end = segment.tile_end; tile < end; ++tile, ++use) {
      shared.k_pipe.wait_full(use);
      shared.p_pipe.wait_full(use);
      ptx::fence_async_shared();
      float alpha[S::kSlots];
      bool rescales = false;
#pragma unroll
      for (int slot = 0; slot < S::kSlots; ++slot) {
        alpha[slot] = shared.alpha[first_row() + S::row(slot)];
        rescales |= alpha[slot] != 1;
      }
      if (__any_sync(~0u, rescales)) {
#pragma unroll
        for (int slot = 0; slot < S::kSlots; ++slot) o.scale_row(slot, alpha[slot]);
      }
      multiply_values(use, [&](int k) { return p.at(k); });
      shared.p_pipe.release(use);
      shared.k_pipe.release(use);
    }
  }

  // S = Q Kᵀ. Odd k steps have an accumulator of their own, which gains 1 %.
  __device__ __forceinline__ void multiply_keys(uint32_t use) {
    S odd;
    using Product = ptx::Wgmma<T, C::kTile>;
    const RowsDescriptor<typename C::QTile> q(ptx::here(ptx::shared_address(shared.q)));
    const RowsDescriptor<typename C::KTile> k(ptx::here(ptx::shared_address(shared.k[use % C::kStages])));
    ptx::wgmma_fence();
    Product::template multiply<true>(s.x[0], q.at(0), k.at(0));
    Product::template multiply<true>(odd.x[0], q.at(1), k.at(1));
#pragma unroll
    for (int step = 2; step < C::kHeadDim / 16; ++step)
      Product::template multiply<false>(step % 2 ? odd.x[0] : s.x[0], q.at(step), k.at(step));
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::hold(s.x[0]);
    ptx::hold(odd.x[0]);
    s.add(odd);
  }

  // O ← O + P V, for this half's columns.
  template <class P>
  __device__ __forceinline__ void multiply_values(uint32_t use, P p) {
    using VTile = SharedTile<T, C::kTile, C::kValueDim / 2>;
    const uint32_t k = ptx::here(ptx::shared_address(shared.k[use % C::kStages]));
    const ColumnsDescriptor<VTile> v(k + kHalf * C::KTile::panel_offset(C::kValueDim / 2 / kChunk<T>));
    ptx::hold(o.x[0]);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kPairs; ++step) multiply(p(step), v.at(step));
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::hold(o.x[0]);
  }
  __device__ __forceinline__ void multiply(const uint32_t (&p)[4], uint64_t v) {
    ptx::Wgmma<T, C::kValueDim / 2>::template multiply<false, 1>(o.x[0], p, v);
  }
  __device__ __forceinline__ void multiply(uint64_t p, uint64_t v) {
    ptx::Wgmma<T, C::kValueDim / 2>::template multiply<false, 0, 1>(o.x[0], p, v);
  }

  // Rounds P. mma's C layout is its A layout.
  __device__ __forceinline__ void round(uint32_t (&p)[kPairs][4]) const {
    const RegistersA<T, S> rounded{s};
#pragma unroll
    for (int k = 0; k < kPairs; ++k) rounded.load(p[k], 0, k);
  }

  // Passes P and alpha to the second warpgroup.
  __device__ __forceinline__ void store_weights(uint32_t use, const uint32_t (&p)[kPairs][4],
                                                const float (&alpha)[S::kSlots]) const {
    shared.p_pipe.wait_empty(use);
    const uint32_t tile = ptx::shared_address(shared.p);
#pragma unroll
    for (int slot = 0; slot < S::kSlots; ++slot) {
      const int row = first_row() + S::row(slot);
#pragma unroll
      for (int n = 0; n < S::kColumnTiles; ++n)
        ptx::store_shared(tile + C::PTile::offset(row, n) + threadIdx.x % 4 * 4, p[n / 2][n % 2 * 2 + slot]);
      if (threadIdx.x % 4 == 0) shared.alpha[row] = alpha[slot];
    }
    ptx::fence_async_shared();
    shared.p_pipe.arrive_by_warp(use);
  }

  // Writes the results of a segment, or of a part of one.
  __device__ __forceinline__ void finish(const LatentSegment& segment, const Softmax (&softmax)[C::kRows]) {
    sync_consumers();  // waits until the softmax is stored
    const ColumnRows rows = rows_of(segment, call.group, kv_head);
    const Parts parts = segment.parts;
    const PartialResults<C::kRows> partial(call);
    const int64_t first = parts.count == 1 ? 0 : partial.row(parts.slot(call.grid, parts.own), kv_head, 0);
#pragma unroll
    for (int slot = 0; slot < S::kSlots; ++slot) {
      const int32_t row = first_row() + S::row(slot);
      if (row >= rows.count() || !is_written(call, rows, segment.work, row)) continue;
      if (parts.count == 1) {
        store_row(segment.work, rows, row, slot, softmax[row]);
      } else {
        store_partial(partial, first + row, slot, softmax[row]);
      }
    }
  }
  __device__ __forceinline__ static void sync_consumers() {
    // The two halves are different code, so they reach the barrier at different instructions.
    ptx::sync_any_group(1, Shared::kConsumers * kWarpgroup);
  }

  // The first feature of the n-th pair of O's columns that this thread has.
  __device__ __forceinline__ int32_t feature(int n) const {
    return kHalf * (C::kValueDim / 2) + O::column(n);
  }

  __device__ __forceinline__ void store_row(const SequenceWork& work, const ColumnRows& rows, int32_t row,
                                            int slot, Softmax all) {
    const int32_t head = rows.head(row), i = rows.position(row);
    const auto [factor, lse] = finish_row(call, work, head, i, all);
    T* const to = call.out.at<T>(work.leading, work.batch_row, head, work.q_begin + i);
#pragma unroll
    for (int n = 0; n < O::kColumnTiles; ++n) {
      if (feature(n) >= call.value_dim) continue;
      const bool zero = factor == 0;
      ptx::store_pair(to + feature(n), zero ? 0 : o.at(slot, n, 0) * factor,
                      zero ? 0 : o.at(slot, n, 1) * factor);
    }
    if (kHalf == 0 && threadIdx.x % 4 == 0)
      store_lse(call, work.leading, work.batch_row, head, work.q_begin + i, lse);
  }

  __device__ __forceinline__ void store_partial(const PartialResults<C::kRows>& partial, int64_t row,
                                                int slot, Softmax softmax) {
    float* const to = partial.o + row * partial.width;
#pragma unroll
    for (int n = 0; n < O::kColumnTiles; ++n) {
      if (feature(n) < call.value_dim)
        *reinterpret_cast<float2*>(to + feature(n)) = make_float2(o.at(slot, n, 0), o.at(slot, n, 1));
    }
    if (kHalf == 0 && threadIdx.x % 4 == 0) partial.softmax[row] = softmax;
  }

  const LatentCall& call;
  Shared& shared;
  int32_t kv_head;
  S s;
  O o;
};

}  // namespace jax_flash::decode
