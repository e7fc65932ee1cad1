// Shared memory of the latent kernels: tiles of Q, K and P, segments, pipelines.
#pragma once

#include <cstdint>

#include "cuda/decode/latent_call.cuh"
#include "cuda/decode/latent_combine.cuh"
#include "cuda/decode/results.cuh"
#include "cuda/launch.h"
#include "cuda/pipeline.cuh"
#include "cuda/registry.h"
#include "cuda/tile/shared_tile.cuh"

namespace jax_flash::decode {

// A segment: the part of an entry that a CTA attends to.
struct LatentSegment {
  SequenceWork work;
  Parts parts;
  int32_t first_row, end_row;  // as in ColumnRows
  int32_t tile, tile_end;
  int32_t done;  // there is no further segment, and this state describes none
};

// O is rescaled when a score exceeds the row's bound by more than this, in powers of two.
inline constexpr float kLatentSlack = 8;

__device__ __forceinline__ ColumnRows rows_of(const LatentSegment& segment, const Divisor& group,
                                              int32_t kv_head) {
  return {group, kv_head, segment.first_row, segment.end_row};
}

// Shared between the load warps and the others. C: LatentSm90, LatentFewSm90 or LatentSm80.
template <class C>
struct LatentTiles {
  static constexpr int kSegments = 3, kWarpKeys = C::kTile / C::kLoadWarps;
  static constexpr uint32_t kWarps = C::kWarps * ptx::kWarpArrivals;

  alignas(1024) uint8_t q[C::QTile::kBytes];
  alignas(1024) uint8_t k[C::kStages][C::KTile::kBytes];
  alignas(1024) uint8_t p[C::PTile::kBytes];
  LatentSegment segments[kSegments];
  uint32_t missing[C::kStages][C::kLoadWarps];  // a bit for each key that is on a page outside the pool
  BlockPipeline<C::kStages> k_pipe;
  BlockPipeline<1> q_pipe;  // Q and its segment
  static_assert(kWarpKeys <= 32);

  // Every thread's copies arrive at the barriers. `missing` and `segments` are stored and not copied, so the
  // stores arrive separately. readers: arrivals of the warps that read a tile of K.
  __device__ __forceinline__ void init_tiles(uint32_t readers = kWarps) {
    constexpr uint32_t kArrivals = C::kLoadWarps * (32 + ptx::kWarpArrivals);
    k_pipe.init(readers, kArrivals);
    q_pipe.init(kWarps, kArrivals);
  }
};

// Launches `kernel`, whose traits are C, for each outer leading entry, and the one that merges parts.
template <class C>
cudaError_t launch_latent(void (*kernel)(LatentCall), const Problem& p, const LaunchPlan& plan,
                          void* workspace, cudaStream_t stream) {
  static_assert(C::kValueDim <= kMergedColumns);
  static_assert(C::kRows == 16 || C::kRows == 64);  // launch_latent_lists() has these
  const DecodeGrid& grid = plan.decode;
  const int64_t blocks = int64_t{grid.columns} * grid.ranges;
  const int32_t* starts = p.packed() ? query_starts(p, plan.queries, workspace) : nullptr;
  for (int64_t outer = 0; blocks > 0 && outer < outer_entries(p.leading); ++outer) {
    const LatentCall call = make_latent_call<C::kTile>(p, grid, C::kRows, outer, starts, workspace);
    cudaError_t e = launch_latent_lists(call, C::kRows, C::kTile, stream);
    const bool early = call.lists && can_wait(reinterpret_cast<const void*>(kernel));
    if (e == cudaSuccess)
      e = launch_early(early, kernel, 1, blocks, C::kThreads, sizeof(typename C::Shared), stream, call);
    if (e == cudaSuccess) e = launch_combine<typename C::Element, C::kRows>(call, stream);
    if (e != cudaSuccess) return e;
  }
  return cudaSuccess;
}

}  // namespace jax_flash::decode
