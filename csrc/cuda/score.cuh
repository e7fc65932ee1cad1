// The general score: scale, softcap, bias, alibi, segments, mask and dropout, one pass over the tile for each
// that the call has. Which it has is uniform over the grid.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>

#include "core/band.h"
#include "core/dropout.h"
#include "core/score.h"
#include "cuda/tile/accumulator.cuh"
#include "cuda/work.cuh"

namespace jax_flash {

// A [s_q, s_k] operand of one head, broadcast by zero strides.
template <class T>
struct ScoreOperand {
  const T* data;
  int64_t row, column;

  __device__ __forceinline__ ScoreOperand(const Problem& p, const View& view, const BlockWork& work,
                                          int32_t head)
      : data(view.as<const T>() + work.offset(p, view, head, 0)), row(view.row), column(view.column) {}

  __device__ __forceinline__ T at(int32_t i, int32_t j) const { return data[i * row + j * column]; }
};

// Which elements of an accumulator dropout keeps.
template <class S>
struct KeptElements {
  uint32_t bits[(S::kSlots * S::kColumnTiles + 15) / 16] = {};

  __device__ __forceinline__ static constexpr int index(int slot, int n, int e) {
    return (slot * S::kColumnTiles + n) * 2 + e;
  }
  __device__ __forceinline__ void set(int slot, int n, int e, bool kept) {
    bits[index(slot, n, e) / 32] |= uint32_t{kept} << index(slot, n, e) % 32;
  }
  __device__ __forceinline__ bool at(int slot, int n, int e) const {
    return bits[index(slot, n, e) / 32] >> index(slot, n, e) % 32 & 1;
  }
};

// Works on the tile of S whose warp begins at query `row` and whose keys begin at `key`, within the sequence.
// Operands are read only where row and key are in use.
class GeneralScore {
 public:
  __device__ __forceinline__ GeneralScore(const Problem& problem, const BlockWork& block, const Band& visible,
                                          int32_t query_head)
      : p(problem), work(block), band(visible), head(query_head) {}

  // S ← log2(e) · (softcap(scale · S) + bias + alibi), −inf where segments or mask hide the key. Where there
  // is a gradient with respect to softcap's result, it becomes the one with respect to its argument.
  template <class S>
  __device__ __forceinline__ void apply(S& s, int32_t row, int32_t key, S* gradient = nullptr) const {
    const float scale = p.spec.scale, cap = p.spec.softcap;
    for_each(s, [&](float& x, int, int, int) { x *= scale; });
    if (cap > 0) {
      for_each(s, [&](float& x, int slot, int n, int e) {
        x = softcap(x, cap);
        if (gradient) gradient->at(slot, n, e) *= softcap_gradient(x, cap);
      });
    }
    if (p.bias) add_bias(s, row, key);
    if (p.alibi_slopes) add_alibi(s, row, key);
    for_each(s, [&](float& x, int, int, int) { x *= kLog2e; });
    if (p.q_segment_ids) hide_other_segments(s, row, key);
    if (p.mask) hide_masked(s, row, key);
  }

  // P ← 0 where dropped; the 1 / (1 − rate) of what is kept waits for the epilogue.
  template <class S>
  __device__ __forceinline__ void drop(S& s, int32_t row, int32_t key) const {
    if (!p.dropout) return;
    for_each_kept<S>(row, key, [&](int slot, int n, int e, bool kept) {
      if (!kept) s.at(slot, n, e) = 0;
    });
  }

  template <class S>
  __device__ __forceinline__ KeptElements<S> kept(int32_t row, int32_t key) const {
    KeptElements<S> result;
    for_each_kept<S>(row, key, [&](int slot, int n, int e, bool kept) { result.set(slot, n, e, kept); });
    return result;
  }

 private:
  // f(slot, n, e, whether it is kept) for every element of this thread.
  template <class S, class F>
  __device__ __forceinline__ void for_each_kept(int32_t row, int32_t key, F f) const {
    const Dropout dropout =
        make_dropout(p.spec, p.dropout, p.dropout.leading_offset(p.leading, work.leading));
#pragma unroll
    for (int slot = 0; slot < S::kSlots; ++slot) {
      const int32_t i = row + S::row(slot);
#pragma unroll
      for (int n = 0; n < S::kColumnTiles; ++n) {
        const uint32_t j = key + S::column(n) + dropout.column;
        uint32_t word = random_word(dropout, i, j);
        f(slot, n, 0, (word >> j % 2 * 16 & 0xFFFFu) >= dropout.threshold);
        // The neighbour's number is in the same word unless a shard begins at an odd column.
        if (j % 2 == 1) word = random_word(dropout, i, j + 1);
        f(slot, n, 1, (word >> (j + 1) % 2 * 16 & 0xFFFFu) >= dropout.threshold);
      }
    }
  }

  // The word with the numbers of columns j and, where j is even, j + 1, both global. Selected without
  // indexing: a run-time index would move the block to local memory.
  __device__ __forceinline__ uint32_t random_word(const Dropout& dropout, int32_t i, uint32_t j) const {
    const PhiloxBlock x = dropout.block(static_cast<uint32_t>(work.tile.index), head, i, j / kDropoutBlock);
    const uint32_t low = j & 2 ? x.word[1] : x.word[0], high = j & 2 ? x.word[3] : x.word[2];
    return j & 4 ? high : low;
  }

  __device__ __forceinline__ bool in_use(int32_t i, int32_t j) const {
    return i < band.q_len && j < band.k_len;
  }

  template <class T, class S>
  __device__ __forceinline__ void add_bias_of(S& s, int32_t row, int32_t key) const {
    const ScoreOperand<T> bias(p, p.bias, work, head);
    for_each(s, [&](float& x, int slot, int n, int e) {
      const int32_t i = row + S::row(slot), j = key + S::column(n) + e;
      if (in_use(i, j)) x += static_cast<float>(bias.at(i, j));
    });
  }

  template <class S>
  __device__ __forceinline__ void add_bias(S& s, int32_t row, int32_t key) const {
    if (p.bias_dtype == DType::kF32) {
      add_bias_of<float>(s, row, key);
    } else if (p.bias_dtype == DType::kF16) {
      add_bias_of<__half>(s, row, key);
    } else {
      add_bias_of<__nv_bfloat16>(s, row, key);
    }
  }

  template <class S>
  __device__ __forceinline__ void add_alibi(S& s, int32_t row, int32_t key) const {
    const View& view = p.alibi_slopes;
    const float slope = view.as<const float>()[view.leading_offset(p.leading, work.leading) +
                                               view.offset(work.tile.index, head, 0)];
    for_each(s, [&](float& x, int slot, int n, int e) {
      x += alibi(slope, band.diagonal(row + S::row(slot)), key + S::column(n) + e);
    });
  }

  template <class S>
  __device__ __forceinline__ void hide_other_segments(S& s, int32_t row, int32_t key) const {
    const int32_t* queries = p.q_segment_ids.as<const int32_t>() + work.offset(p, p.q_segment_ids, head, 0);
    const int32_t* keys = p.kv_segment_ids.as<const int32_t>() + work.offset(p, p.kv_segment_ids, head, 0);
    for_each(s, [&](float& x, int slot, int n, int e) {
      const int32_t i = row + S::row(slot), j = key + S::column(n) + e;
      if (in_use(i, j) && queries[i] != keys[j]) x = -INFINITY;
    });
  }

  template <class S>
  __device__ __forceinline__ void hide_masked(S& s, int32_t row, int32_t key) const {
    const ScoreOperand<uint8_t> mask(p, p.mask, work, head);
    for_each(s, [&](float& x, int slot, int n, int e) {
      const int32_t i = row + S::row(slot), j = key + S::column(n) + e;
      if (in_use(i, j) && !mask.at(i, j)) x = -INFINITY;
    });
  }

  const Problem& p;
  const BlockWork& work;
  const Band& band;
  int32_t head;
};

__device__ __forceinline__ float dropout_scale(const AttentionSpec& spec) {
  return spec.has(Operand::kDropout) ? 1.0f / (1.0f - spec.dropout_rate) : 1.0f;
}

}  // namespace jax_flash
