// The warpgroup of cuda/decode/hopper.cuh that computes S and P.
#pragma once

#include <cstdint>

#include "cuda/decode/hopper_latent_state.cuh"
#include "cuda/decode/latent_softmax.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/tile/accumulator.cuh"
#include "cuda/tile/descriptor.cuh"
#include "cuda/tile/operands.cuh"

namespace jax_flash::decode {

// Some of its query columns are in registers, which leaves shared memory for one more tile of K.
template <class C>
class LatentScores {
 public:
  using T = typename C::Element;
  using Shared = typename C::Shared;
  using S = Accumulator<1, C::kTile / 8>;

  __device__ __forceinline__ LatentScores(const LatentCall& decode, Shared& memory, int32_t head)
      : call(decode), shared(memory), kv_head(head) {}

  __device__ __forceinline__ void run() {
    uint32_t use = 0;
#pragma unroll 1
    for (uint32_t number = 0;; ++number) {
      shared.q_pipe.wait_full(number);
      const LatentSegment& segment = shared.segments[number % Shared::kSegments];
      if (uniform(segment.done)) return;
      score(segment, number, use);
    }
  }

 private:
  static constexpr int kPairs = C::kTile / 16;  // P V takes a wgmma per pair of P's 8-column tiles
  static constexpr int kHeldSteps = latent::kQueryColumnsInRegisters / 16, kSteps = C::kHeadDim / 16;

  // The first of the 16 rows that this warp has.
  __device__ __forceinline__ static int32_t first_row() { return ptx::thread_index() % kWarpgroup / 32 * 16; }

  // P of all tiles of a segment, and the softmax at its end.
  __device__ __forceinline__ void score(const LatentSegment& segment, uint32_t number, uint32_t& use) {
    const ColumnRows rows = rows_of(segment, call.group, kv_head);
    read_queries(segment, rows);
    LatentSoftmax<C, S> softmax(segment, rows, first_row());
    const int32_t tile_end = segment.tile_end;
#pragma unroll 1
    for (int32_t tile = segment.tile; tile < tile_end; ++tile, ++use) {
      shared.k_pipe.wait_full(use);
      ptx::fence_async_shared();  // because cp.async made the copies
      multiply_keys(use);
      if (tile + 1 == tile_end) shared.q_pipe.release(number);
      softmax.score(s, DecodeTile<S>{call, rows, segment.work, tile * C::kTile, call.scale, first_row()},
                    shared.missing[use % C::kStages]);
      shared.k_pipe.release(use);
      if (call.row_max) raise_row_maxima(call, rows, segment.work, first_row(), s);
      float alpha[S::kSlots];
      softmax.update(s, alpha);
      store_weights(use, alpha);
    }
    softmax.sum();
    store_softmax(number, softmax);
  }

  // Reads the first columns of Q as fragments. Rows past the segment's last one are 0.
  __device__ __forceinline__ void read_queries(const LatentSegment& segment, const ColumnRows& rows) {
    const SequenceWork& work = segment.work;
#pragma unroll
    for (int slot = 0; slot < S::kSlots; ++slot) {
      const int32_t row = first_row() + S::row(slot);
      const bool used = row < rows.count();
      const int32_t at = used ? row : 0;
      const auto* const from =
          reinterpret_cast<const uint32_t*>(call.query.at<const T>(
              work.leading, work.batch_row, rows.head(at), work.q_begin + rows.position(at))) +
          threadIdx.x % 4;
#pragma unroll
      for (int step = 0; step < kHeldSteps; ++step)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          query[step][2 * half + slot] = used ? __ldg(from + 8 * step + 4 * half) : 0;
    }
    ptx::hold(query);
  }

  // S = Q Kᵀ
  __device__ __forceinline__ void multiply_keys(uint32_t use) {
    using Product = ptx::Wgmma<T, C::kTile>;
    const RowsDescriptor<typename C::QTile> q(ptx::here(ptx::shared_address(shared.q)));
    const RowsDescriptor<typename C::KTile> k(ptx::here(ptx::shared_address(shared.k[use % C::kStages])));
    ptx::hold(query);
    ptx::wgmma_fence();
    Product::template multiply<true>(s.x[0], query[0], k.at(0));
#pragma unroll
    for (int step = 1; step < kHeldSteps; ++step)
      Product::template multiply<false>(s.x[0], query[step], k.at(step));
#pragma unroll
    for (int step = kHeldSteps; step < kSteps; ++step)
      Product::template multiply<false>(s.x[0], q.at(step - kHeldSteps), k.at(step));
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::hold(s.x[0]);
  }

  // Passes P, rounded, and alpha to the other warpgroups.
  __device__ __forceinline__ void store_weights(uint32_t use, const float (&alpha)[S::kSlots]) const {
    shared.p_pipe.wait_empty(use);
    const uint32_t tile = shared.weights(use);
    const RegistersA<T, S> rounded{s};  // mma's C layout is its A layout
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      uint32_t p[4];
      rounded.load(p, 0, pair);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        ptx::store_shared(
            tile + C::PTile::offset(first_row() + S::row(i % 2), 2 * pair + i / 2) + threadIdx.x % 4 * 4,
            p[i]);
    }
    if (threadIdx.x % 4 == 0) {
#pragma unroll
      for (int slot = 0; slot < S::kSlots; ++slot)
        shared.alpha[use % latent::kWeightStages][first_row() + S::row(slot)] = alpha[slot];
    }
    ptx::fence_async_shared();
    shared.p_pipe.arrive_by_warp(use);
  }

  template <class Softmax>
  __device__ __forceinline__ void store_softmax(uint32_t number, const Softmax& softmax) const {
    shared.softmax_pipe.wait_empty(number);
    if (threadIdx.x % 4 == 0) {
#pragma unroll
      for (int slot = 0; slot < S::kSlots; ++slot)
        shared.softmax[number % Shared::kEnds][first_row() + S::row(slot)] = {softmax.m[slot],
                                                                              softmax.l[slot]};
    }
    shared.softmax_pipe.arrive_by_warp(number);
  }

  const LatentCall& call;
  Shared& shared;
  int32_t kv_head;
  uint32_t query[kHeldSteps][4];  // fragments of Q's first columns
  S s;
};

}  // namespace jax_flash::decode
