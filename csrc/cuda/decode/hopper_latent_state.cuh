// Shared memory of cuda/decode/hopper.cuh.
#pragma once

#include <cstdint>

#include "cuda/decode/latent_state.cuh"
#include "cuda/hopper/pipeline.cuh"
#include "cuda/hopper/roles.cuh"

namespace jax_flash::decode {

// C: LatentSm90. Each of the two consumer warpgroups has half of O's columns;
// the first one also computes P.
template <class C>
struct LatentShared : LatentTiles<C> {
  static constexpr int kConsumers = 2, kEnds = 2;  // kEnds: segments that may be ending at the same time
  static constexpr uint32_t kPArrivals = kConsumerWarps * ptx::kWarpArrivals;

  float alpha[C::kRows];             // factors of O's rows before P V is added
  Softmax softmax[kEnds][C::kRows];  // of segments, at their end
  BlockPipeline<1> p_pipe;           // P and alpha

  __device__ __forceinline__ void init() {
    this->init_tiles();
    p_pipe.init(kPArrivals, kPArrivals);
    ptx::fence_barriers();
  }
};

}  // namespace jax_flash::decode
