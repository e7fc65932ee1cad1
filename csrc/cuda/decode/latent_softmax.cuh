// The softmax of a tile's scores in mma's C layout, for the warps of the sm_90a kernels of latent pools. The
// rows belong to one chunk, and each thread has some of their keys.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/decode/latent_state.cuh"
#include "cuda/decode/score_tile.cuh"
#include "cuda/decode/warp_attention.cuh"
#include "cuda/mask.cuh"
#include "cuda/score/decode.cuh"

namespace jax_flash::decode {

// C: LatentSm90 or LatentFewSm90.
template <class C, class S>
struct LatentSoftmax {
  Interval seen[S::kSlots];          // the keys that a row sees
  Interval common;                   // the keys that all rows see
  float m[S::kSlots], l[S::kSlots];  // the bound on a row's scores, and this thread's share of Σ P

  // first_row: the warp's first row.
  __device__ __forceinline__ LatentSoftmax(const LatentSegment& segment, const ColumnRows& rows,
                                           int32_t first_row) {
#pragma unroll
    for (int slot = 0; slot < S::kSlots; ++slot) {
      const int32_t row = first_row + S::row(slot);
      seen[slot] = row < rows.count() ? segment.work.band.row(rows.position(row)) : Interval{0, 0};
      m[slot] = -INFINITY, l[slot] = 0;
    }
    common = segment.work.band.common(rows.first_position(), segment.work.end_position(rows));
  }

  // S ← the scores of Q Kᵀ: applies options and hides keys that a row does not see. S of keys on pages
  // outside the pool, whose elements are loaded as zeros, becomes NaN.
  __device__ __forceinline__ void score(S& s, const DecodeTile<S>& tile,
                                        const uint32_t (&missing)[C::kLoadWarps]) const {
    uint64_t all = 0;
#pragma unroll
    for (int i = 0; i < C::kLoadWarps; ++i) all |= uint64_t{missing[i]} << i * (C::kTile / C::kLoadWarps);
    if (all != 0) {
      for_each(s, [&](float& x, int, int n, int e) {
        if (all >> S::column(n, e) & 1) x = NAN;
      });
    }
    typename C::Score().apply(s, tile);
    if (tile.key < common.lo || tile.key + C::kTile > common.hi) {
      hide(s, tile.key, -INFINITY, [&](int slot) { return seen[slot].lo; }, BeforeLimit{});
      hide(s, tile.key, -INFINITY, [&](int slot) { return seen[slot].hi; }, FromLimit{});
    }
  }

  // m ← the row's bound, raised by a factor 1/α if a score exceeds it by more than kLatentSlack; S ← 2^(S −
  // m); l ← α l + rowsum S. Each row decides for itself, so that its bits depend on no other row. Returns the
  // warp's vote on whether any bound was raised.
  __device__ __forceinline__ bool update(S& s, float (&alpha)[S::kSlots]) {
    bool raised = false;
#pragma unroll
    for (int slot = 0; slot < S::kSlots; ++slot) {
      float top = s.at(slot, 0, 0);
#pragma unroll
      for (int n = 0; n < S::kColumnTiles; ++n) top = fmaxf(top, fmaxf(s.at(slot, n, 0), s.at(slot, n, 1)));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
      alpha[slot] = 1;
      if (top > m[slot] + kLatentSlack) {
        alpha[slot] = ptx::exp2(m[slot] - top);
        m[slot] = top, raised = true;
        l[slot] *= alpha[slot];
      }
      // If no key has been seen yet, P must be 0, not NaN.
      const float bound = m[slot] == -INFINITY ? 0 : m[slot];
#pragma unroll
      for (int n = 0; n < S::kColumnTiles; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s.at(slot, n, e);
          x = ptx::exp2(x - bound);
          l[slot] += x;
        }
    }
    return __any_sync(~0u, raised);
  }

  // Sums l over all threads that share the rows.
  __device__ __forceinline__ void sum() {
#pragma unroll
    for (int slot = 0; slot < S::kSlots; ++slot) {
      l[slot] += __shfl_xor_sync(~0u, l[slot], 1);
      l[slot] += __shfl_xor_sync(~0u, l[slot], 2);
    }
  }
};

}  // namespace jax_flash::decode
