// Shared memory of cuda/decode/hopper.cuh.
#pragma once

#include <cstdint>

#include "cuda/decode/latent_state.cuh"
#include "cuda/hopper/pipeline.cuh"
#include "cuda/hopper/roles.cuh"

namespace jax_flash::decode {

// C: LatentSm90. Two consumer warpgroups have half of O's columns each;
// the first also computes P.
template <class C>
struct LatentShared : LatentTiles<C> {
  static constexpr int kConsumers = 2, kEnds = 2;  // segments that may be ending
  static constexpr uint32_t kPArrivals = kConsumerWarps * ptx::kWarpArrivals;

  float alpha[C::kRows];             // what the rows of O are multiplied by before P V is added
  Softmax softmax[kEnds][C::kRows];  // of a segment, when it ends
  BlockPipeline<1> p_pipe;           // P and alpha

  __device__ __forceinline__ void init() {
    this->init_tiles();
    p_pipe.init(kPArrivals, kPArrivals);
    ptx::fence_barriers();
  }
};

}  // namespace jax_flash::decode
