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

// What both kernels share between producers and consumers.
template <class C>
struct LatentTiles {
  static constexpr int kConsumers = 2, kSegments = 2;
  static constexpr uint32_t kWarps = kConsumerWarps * ptx::kWarpArrivals;

  alignas(1024) uint8_t q[C::QTile::kBytes];
  alignas(1024) uint8_t k[C::kStages][C::KTile::kBytes];
  alignas(1024) uint8_t p[C::kWeightTiles][C::PTile::kBytes];
  LatentSegment segments[kSegments];
  uint16_t missing[C::kStages][kConsumerWarps];  // a bit for each key that is on a page outside the pool
  Pipeline<C::kStages> k_pipe;
  Pipeline<1> q_pipe;  // Q and its segment
  bool is_last;

  // Copies are counted by thread. `missing` and `segments` are stored, and so are counted apart from them.
  // `releases`: warpgroups that read a tile of keys.
  __device__ __forceinline__ void init_tiles(uint32_t releases) {
    k_pipe.init(releases * kWarps, kWarpgroup + kWarps);
    q_pipe.init(kConsumers * kWarps, kWarpgroup + kWarps);
  }
};

// C: LatentSm90. Two consumer warpgroups have half of O's columns each. The first also computes P.
template <class C>
struct LatentShared : LatentTiles<C> {
  using Tiles = LatentTiles<C>;
  float alpha[C::kRows];                        // what the rows of O are multiplied by before P V is added
  Softmax softmax[Tiles::kSegments][C::kRows];  // of a segment, when it ends
  Pipeline<1> p_pipe;                           // P and alpha

  __device__ __forceinline__ void init() {
    this->init_tiles(Tiles::kConsumers);
    p_pipe.init(Tiles::kWarps, Tiles::kWarps);
    ptx::fence_barriers();
  }
};

// C: LatentFewSm90. Each consumer warpgroup has a tile of keys to itself, and all columns of O.
template <class C>
struct LatentFewShared : LatentTiles<C> {
  using Tiles = LatentTiles<C>;
  alignas(16) float o[C::kRows][latent::few_pitch(C::kValueDim)];         // O of a segment, when it ends
  float maxima[Tiles::kConsumers][kConsumerWarps][C::kRows];  // of a warp's scores
  float bounds[Tiles::kConsumers][C::kRows];                  // m of a segment, when it ends,
  float sums[Tiles::kConsumers][kConsumerWarps][C::kRows];    // and l, of each warp's keys

  __device__ __forceinline__ void init() {
    this->init_tiles(1);
    ptx::fence_barriers();
  }
};

}  // namespace jax_flash::decode
