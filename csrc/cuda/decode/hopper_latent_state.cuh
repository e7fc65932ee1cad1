// Shared memory of cuda/decode/hopper.cuh.
#pragma once

#include <cstdint>

#include "core/families/latent_layout.h"
#include "cuda/decode/latent_state.cuh"
#include "cuda/hopper/pipeline.cuh"
#include "cuda/hopper/roles.cuh"

namespace jax_flash::decode {

// C: LatentSm90. The scores' warpgroup writes P, the factors of O and, at a segment's end, the softmax; the
// values' warpgroups read them.
template <class C>
struct LatentShared : LatentTiles<C> {
  static constexpr int kEnds = 2;  // segments that may be ending at the same time

  float alpha[latent::kWeightStages][C::kRows];  // factors of O's rows before P V is added
  Softmax softmax[kEnds][C::kRows];              // of segments, at their end
  BlockPipeline<latent::kWeightStages> p_pipe;   // P and alpha
  BlockPipeline<kEnds> softmax_pipe;

  __device__ __forceinline__ uint32_t weights(uint32_t use) const {
    return ptx::shared_address(this->p) + use % latent::kWeightStages * C::PTile::kBytes;
  }
  __device__ __forceinline__ void init() {
    constexpr uint32_t kWrites = kConsumerWarps * ptx::kWarpArrivals, kReads = C::kWarps * ptx::kWarpArrivals;
    this->init_tiles();
    p_pipe.init(kReads, kWrites);
    softmax_pipe.init(kReads, kWrites);
    ptx::fence_barriers();
  }
};

}  // namespace jax_flash::decode
