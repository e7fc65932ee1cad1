// The results of a segment in the kernels of latent pools.
#pragma once

#include <cstdint>

#include "cuda/decode/combine.cuh"
#include "cuda/decode/latent_state.cuh"
#include "cuda/ptx/math.cuh"

namespace jax_flash::decode {

// Stores o and lse of a segment if it is all of its entry; else stores a partial result, and the CTA that
// finishes the entry's last part merges them. O is an Accumulator.
template <class C, class O>
struct LatentResults {
  const LatentCall& call;
  const SequenceWork& work;
  int32_t kv_head;
  Parts parts;
  const ColumnRows& rows;
  PartialResults<C::kRows> partial;
  int64_t first;  // the first row of the segment in `partial`

  __device__ __forceinline__ LatentResults(const LatentCall& decode, const LatentSegment& segment,
                                           const ColumnRows& of_segment, int32_t head)
      : call(decode),
        work(segment.work),
        kv_head(head),
        parts(segment.parts),
        rows(of_segment),
        partial(call),
        first(is_whole() ? 0 : partial.row(parts.slot(call.grid, parts.own), head, 0)) {}

  __device__ __forceinline__ bool is_whole() const { return parts.count == 1; }

  // Stores this thread's pairs n < kPairs of a row of O, at features feature(n), with the row's softmax if
  // `with_softmax`. softmax_of(row, slot): the softmax of the segment's keys.
  template <int kPairs, class Feature, class SoftmaxOf>
  __device__ __forceinline__ void store(const O& o, int32_t row, int slot, bool with_softmax, Feature feature,
                                        SoftmaxOf softmax_of) const {
    if (row >= rows.count() || !is_written(call, rows, work, row)) return;
    const Softmax all = softmax_of(row, slot);
    if (is_whole()) {
      const int32_t head = rows.head(row), i = rows.position(row);
      const auto [factor, lse] = finish_row(call, work, head, i, all);
      using T = typename C::Element;
      T* const to = call.out.at<T>(work.leading, work.batch_row, head, work.q_begin + i);
      const bool zero = factor == 0;
#pragma unroll
      for (int n = 0; n < kPairs; ++n) {
        if (feature(n) < call.value_dim)
          ptx::store_pair(to + feature(n), zero ? 0 : o.at(slot, n, 0) * factor,
                          zero ? 0 : o.at(slot, n, 1) * factor);
      }
      if (with_softmax) store_lse(call, work.leading, work.batch_row, head, work.q_begin + i, lse);
    } else {
      float* const to = partial.o + (first + row) * partial.width;
#pragma unroll
      for (int n = 0; n < kPairs; ++n) {
        if (feature(n) < call.value_dim)
          *reinterpret_cast<float2*>(to + feature(n)) = make_float2(o.at(slot, n, 0), o.at(slot, n, 1));
      }
      if (with_softmax) partial.softmax[first + row] = all;
    }
  }

  // Merges the entry's parts if this one is the last to be finished. sync(): a barrier of all threads that
  // stored; they have passed it since. The two numbers are those of combine().
  template <int kPartsAtOnce = 0, int kBlocksAtOnce = 1, class Sync>
  __device__ __forceinline__ void merge(bool& is_last, Sync sync) const {
    if (is_whole()) return;
    if (threadIdx.x == 0) is_last = count_part(partial.counter(parts, kv_head), parts.count);
    sync();
    if (is_last) combine<C, kPartsAtOnce, kBlocksAtOnce>(call, rows, work, partial, parts, kv_head);
  }
};

}  // namespace jax_flash::decode
