// Dropout's bits for consumers of cuda/backward/hopper.cuh with 128 query rows. Drawing them takes longer
// than a step's exponentials, so a step draws the bits of the next step while dQ, dV and dK are multiplied.
#pragma once

#include <cstdint>

#include "cuda/backward/hopper_step.cuh"
#include "cuda/backward/query_step.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/score/dropout.cuh"

namespace jax_flash {

// The elements of step `use` that dropout keeps, for this warp's 16 keys and all rows. Their bits lie in the
// warp's rows of the step's dSᵀ until the warp stores dSᵀ there. In registers ptxas would test them before
// the wait for dP, and spill.
template <class Consumer>
struct KeptOfStep {
  using C = typename Consumer::Config;
  using Kept = KeptElements<typename C::S>;
  static constexpr uint32_t kPitch = Consumer::DsTile::kPitch, kKeys = 16, kHalf = C::kM / 2;
  static constexpr int kFirstBarrier = 4;  // of the named barriers for two warps each
  static_assert(Kept::kWords == 2 && kHalf == 64 && kDropoutColumns == 2 * kKeys);

  const Consumer& warpgroup;
  uint32_t use;

  // Where this lane has word 0; word i lies i rows further.
  __device__ __forceinline__ uint32_t address() const {
    return ptx::shared_address(warpgroup.shared.ds[use % C::kDsStages]) +
           (warpgroup.consumer * kConsumerRows + Consumer::warp_row()) * kPitch + Consumer::lane() * 4;
  }
  __device__ __forceinline__ Kept load() const {
    Kept kept;
#pragma unroll
    for (int i = 0; i < Kept::kWords; ++i) kept.bits[i] = ptx::load_shared(address() + i * kPitch);
    return kept;
  }
  __device__ __forceinline__ void draw(const TileDropout& at) const {
    if constexpr (C::kReleasesDs) warpgroup.shared.ds_pipe.wait_empty(use);
    if (!at.dropout.needs_scalar_path()) return draw_for_two(at);
    const Kept kept = at.elements<typename C::S>();
#pragma unroll
    for (int i = 0; i < Kept::kWords; ++i) ptx::store_shared(address() + i * kPitch, kept.bits[i]);
  }

 private:
  // A Philox block has 32 keys, those of two warps. The warp of the lower keys draws the blocks of the lower
  // half of the rows for both, and the other warp those of the upper half.
  __device__ __forceinline__ void draw_for_two(const TileDropout& at) const {
    constexpr int kTogether = 2;  // Philox blocks side by side: each is a chain of dependent instructions
    const uint32_t upper = Consumer::warp_row() / kKeys % 2, odd = Consumer::lane() / 4 % 2;
    const uint32_t row = at.row + upper * kHalf + Consumer::lane() % 4 * 2 + odd;
    const uint32_t index = (at.key + at.dropout.column) / kDropoutColumns * 4 + Consumer::lane() / 8;
    const uint32_t threshold = pair_of(at.dropout.threshold);
    uint32_t bits[2] = {};  // of the lower keys and of the upper ones
#pragma unroll
    for (int group = 0; group < static_cast<int>(kHalf) / kDropoutRows; group += kTogether) {
      PhiloxBlock blocks[kTogether];
#pragma unroll
      for (int b = 0; b < kTogether; ++b)
        blocks[b] = at.dropout.counter(at.batch, at.head, row + kDropoutRows * (group + b), index);
      philox(at.dropout.key0, at.dropout.key1, blocks);
#pragma unroll
      for (int b = 0; b < kTogether; ++b) {
#pragma unroll
        for (int word = 0; word < 4; ++word) {
          const int bit = 4 * (group + b) + word % 2;
          // The bits of two adjacent rows lie 16 bits apart.
          exchange_rows(blocks[b].word[word], odd, threshold, [&](int pair, uint32_t mask) {
            bits[word / 2] |= mask & pair_of(1u << (bit + 2 * pair));
          });
        }
      }
    }
    const uint32_t lower_keys = address() - upper * kKeys * kPitch + upper * kPitch;  // of the warp of these
    ptx::store_shared(lower_keys, bits[0]);
    ptx::store_shared(lower_keys + kKeys * kPitch, bits[1]);
    ptx::sync_any_group(kFirstBarrier + warpgroup.warp_index() / 2, 64);
  }
};
template <class Consumer>
KeptOfStep(const Consumer&, uint32_t) -> KeptOfStep<Consumer>;

// Draws the bits of a step.
template <class Consumer>
__device__ __forceinline__ void draw_kept(const Consumer& warpgroup, const QueryStep& step) {
  const StepTile<Consumer> at{warpgroup, step};
  const auto operands = at.operands();
  KeptOfStep{warpgroup, static_cast<uint32_t>(step.number)}.draw(operands.dropout_at(at.row(), at.key));
}
// Draws those of the step after `step`. After the last step of a key tile they are not used.
template <class Consumer, class Walk>
__device__ __forceinline__ void draw_next(const Consumer& warpgroup, QueryStep step, const Walk& walk) {
  step.advance(walk);
  draw_kept(warpgroup, step);
}

}  // namespace jax_flash
