// What the warps of cuda/decode/hopper.cuh share: tiles of Q, K and P, segments, pipelines.
#pragma once

#include <cstdint>

#include "cuda/decode/latent_call.cuh"
#include "cuda/decode/results.cuh"
#include "cuda/hopper/pipeline.cuh"
#include "cuda/hopper/roles.cuh"
#include "cuda/tile/shared_tile.cuh"

namespace jax_flash::decode {

// A segment: the part of an entry that a CTA attends to.
struct LatentSegment {
  SequenceWork work;
  Parts parts;
  int32_t first_row, end_row;  // of ColumnRows
  int32_t tile, tile_end;
  int32_t done;  // there is no further segment, and this is none
};

// C: LatentSm90. What producers and consumers share. Two consumer warpgroups have half of O's columns each;
// the first also computes P.
template <class C>
struct LatentShared {
  static constexpr int kConsumers = 2, kSegments = 2;
  static constexpr uint32_t kWarps = kConsumerWarps * ptx::kWarpArrivals;

  alignas(1024) uint8_t q[C::QTile::kBytes];
  alignas(1024) uint8_t k[C::kStages][C::KTile::kBytes];
  alignas(1024) uint8_t p[C::PTile::kBytes];
  LatentSegment segments[kSegments];
  uint16_t missing[C::kStages][kConsumerWarps];  // a bit for each key that is on a page outside the pool
  float alpha[C::kRows];                         // what the rows of O are multiplied by before P V is added
  Softmax softmax[kSegments][C::kRows];          // of a segment, when it ends
  Pipeline<C::kStages> k_pipe;
  Pipeline<1> q_pipe;  // Q and its segment
  Pipeline<1> p_pipe;  // P and alpha
  bool is_last;

  // Copies are counted by thread. `missing` and `segments` are stored, and so are counted apart from them.
  __device__ __forceinline__ void init() {
    k_pipe.init(kConsumers * kWarps, kWarpgroup + kWarps);
    q_pipe.init(kConsumers * kWarps, kWarpgroup + kWarps);
    p_pipe.init(kWarps, kWarps);
    ptx::fence_barriers();
  }
};

}  // namespace jax_flash::decode
