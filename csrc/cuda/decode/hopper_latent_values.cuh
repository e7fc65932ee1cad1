// The two warpgroups of cuda/decode/hopper.cuh that compute O, half of the columns each.
#pragma once

#include <cstdint>

#include "cuda/decode/combine.cuh"
#include "cuda/decode/hopper_latent_state.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/tile/accumulator.cuh"
#include "cuda/tile/descriptor.cuh"

namespace jax_flash::decode {

template <class C>
class LatentValues {
 public:
  using T = typename C::Element;
  using Shared = typename C::Shared;
  using O = Accumulator<1, C::kValueDim / 16>;
  // ptxas wants an instruction's operands to fit the registers that the kernel is launched with, so a product
  // has a quarter of the columns.
  static constexpr int kProducts = 2, kProductColumns = C::kValueDim / 2 / kProducts;

  __device__ __forceinline__ LatentValues(const LatentCall& decode, Shared& memory, int32_t head,
                                          int of_columns)
      : call(decode), shared(memory), kv_head(head), half(of_columns) {}

  __device__ __forceinline__ void run() {
    uint32_t use = 0;
#pragma unroll 1
    for (uint32_t number = 0;; ++number) {
      shared.q_pipe.wait_full(number);
      const LatentSegment& segment = shared.segments[number % Shared::kSegments];
      if (uniform(segment.done)) return;
      shared.q_pipe.release(number);
      if (threadIdx.x == 0 && segment.parts.count > 1)
        prepare_counter(PartialResults<C::kRows>(call).counter(segment.parts, kv_head));
      o.clear();
      for (uint32_t end = use + (segment.tile_end - segment.tile); use < end; ++use) add_values(use);
      finish(segment, number);
    }
  }

 private:
  // The first of the 16 rows that this warp has of the 64.
  __device__ __forceinline__ static int32_t first_row() { return ptx::thread_index() % kWarpgroup / 32 * 16; }

  // O ← α O + P V, for this half's columns.
  __device__ __forceinline__ void add_values(uint32_t use) {
    using VTile = SharedTile<T, C::kTile, kProductColumns>;
    using Product = ptx::Wgmma<T, kProductColumns>;
    shared.k_pipe.wait_full(use);
    shared.p_pipe.wait_full(use);
    ptx::fence_async_shared();  // because cp.async made the copies
    float alpha[O::kSlots];
    bool rescales = false;
#pragma unroll
    for (int slot = 0; slot < O::kSlots; ++slot) {
      alpha[slot] = shared.alpha[use % latent::kWeightStages][first_row() + O::row(slot)];
      rescales |= alpha[slot] != 1;
    }
    if (__any_sync(~0u, rescales)) {
#pragma unroll
      for (int slot = 0; slot < O::kSlots; ++slot) o.scale_row(slot, alpha[slot]);
    }
    const RowsDescriptor<typename C::PTile> p(ptx::here(shared.weights(use)));
    const uint32_t k = ptx::here(ptx::shared_address(shared.k[use % C::kStages]));
    const ColumnsDescriptor<VTile> v(k + half * C::KTile::panel_offset(C::kValueDim / 2 / kChunk<T>));
    auto& part = reinterpret_cast<float (&)[kProducts][kProductColumns / 8][4]>(o.x[0]);
    ptx::hold(o.x[0]);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < C::kTile / 16; ++step)
#pragma unroll
      for (int i = 0; i < kProducts; ++i)
        Product::template multiply<false, 0, 1>(
            part[i], p.at(step), v.at(step) + i * C::KTile::panel_offset(kProductColumns / kChunk<T>) / 16);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::hold(o.x[0]);
    shared.p_pipe.release(use);
    shared.k_pipe.release(use);
  }

  // Writes the results of a segment, or merges them with those of the entry's other parts if this one is the
  // last to be finished.
  __device__ __forceinline__ void finish(const LatentSegment& segment, uint32_t number) {
    shared.softmax_pipe.wait_full(number);
    const auto& softmax = shared.softmax[number % Shared::kEnds];
    const ColumnRows rows = rows_of(segment, call.group, kv_head);
    const Parts parts = segment.parts;
    const PartialResults<C::kRows> partial(call);
    const int64_t first = parts.count == 1 ? 0 : partial.row(parts.slot(call.grid, parts.own), kv_head, 0);
#pragma unroll
    for (int slot = 0; slot < O::kSlots; ++slot) {
      const int32_t row = first_row() + O::row(slot);
      if (row >= rows.count() || !is_written(call, rows, segment.work, row)) continue;
      if (parts.count == 1) {
        store_row(segment.work, rows, row, slot, softmax[row]);
      } else {
        store_partial(partial, first + row, slot, softmax[row]);
      }
    }
    shared.softmax_pipe.release(number);
    if (parts.count == 1) return;
    sync();
    if (threadIdx.x == 0) shared.is_last = count_part(partial.counter(parts, kv_head), parts.count);
    sync();
    if (shared.is_last)
      combine<C, C::kPartsAtOnce, C::kBlocksAtOnce>(call, rows, segment.work, partial, parts, kv_head);
  }
  __device__ __forceinline__ static void sync() { ptx::sync_group(1, C::kWarps * 32); }

  // Calls store(n, feature) for the pairs of O's columns that this thread has, with their first feature. The
  // features are computed here, because they would not fit in registers during the loop over tiles.
  template <class Store>
  __device__ __forceinline__ void for_each_pair(Store store) const {
    const auto first = static_cast<int32_t>(ptx::here(half * (C::kValueDim / 2) + O::column(0)));
#pragma unroll
    for (int n = 0; n < O::kColumnTiles; ++n)
      if (first + 8 * n < call.value_dim) store(n, first + 8 * n);
  }

  __device__ __forceinline__ void store_row(const SequenceWork& work, const ColumnRows& rows, int32_t row,
                                            int slot, Softmax all) {
    const int32_t head = rows.head(row), i = rows.position(row);
    const auto [scale, lse] = finish_row(call, work, head, i, all);
    T* const to = call.out.at<T>(work.leading, work.batch_row, head, work.q_begin + i);
    const float factor = scale;
    const bool zero = factor == 0;
    for_each_pair([&](int n, int32_t feature) {
      ptx::store_pair(to + feature, zero ? 0 : o.at(slot, n, 0) * factor,
                      zero ? 0 : o.at(slot, n, 1) * factor);
    });
    if (half == 0 && threadIdx.x % 4 == 0)
      store_lse(call, work.leading, work.batch_row, head, work.q_begin + i, lse);
  }

  __device__ __forceinline__ void store_partial(const PartialResults<C::kRows>& partial, int64_t row,
                                                int slot, Softmax softmax) {
    float* const to = partial.o + row * partial.width;
    for_each_pair([&](int n, int32_t feature) {
      *reinterpret_cast<float2*>(to + feature) = make_float2(o.at(slot, n, 0), o.at(slot, n, 1));
    });
    if (half == 0 && threadIdx.x % 4 == 0) partial.softmax[row] = softmax;
  }

  const LatentCall& call;
  Shared& shared;
  int32_t kv_head;
  int half;  // which columns of O this warpgroup has
  O o;
};

}  // namespace jax_flash::decode
