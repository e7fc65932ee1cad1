// Shared memory of cuda/backward/hopper.cuh: the key tiles' states, tiles of the operands, pipelines.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/backward/hopper_key_tile.cuh"
#include "cuda/backward/query_step.cuh"
#include "cuda/gradient.cuh"
#include "cuda/hopper/pipeline.cuh"
#include "cuda/hopper/roles.cuh"
#include "cuda/score/segment_ranges.cuh"

namespace jax_flash {

// Listed steps on their way from the statistics warp to consumers. A consumer is always fewer steps behind
// that warp, because the stages of statistics and of dS limit the distance.
template <bool kListed>
struct StepRing {
  static constexpr uint32_t kSteps = 8;
  int32_t listed[kSteps];

  __device__ __forceinline__ void put(const ListedQueryStep& step) {
    listed[step.number % kSteps] = step.listed;
  }
  __device__ __forceinline__ int32_t element(const QueryStep& step) const {
    return uniform(listed[step.number % kSteps]);
  }
  __device__ __forceinline__ QueryStep get(const QueryStep& step) const {
    const int32_t own = element(step);
    return {ListedStep::head(own), ListedStep::tile(own), step.number};
  }
};
template <>
struct StepRing<false> {
  __device__ __forceinline__ void put(const QueryStep&) {}
  __device__ __forceinline__ const QueryStep& get(const QueryStep& step) const { return step; }
};

// Zeros the rows of a tile for which is_clean(row) is false, since they may hold NaN, and 0 · NaN is NaN.
// Each of `threads` threads clears its share.
template <class Tile, class IsClean>
__device__ __forceinline__ void clear_rows(uint8_t* tile, IsClean is_clean, int thread, int threads) {
  const uint32_t to = ptx::shared_address(tile);
#pragma unroll 1
  for (int at = thread; at < Tile::kRows * Tile::kChunks; at += threads) {
    const int row = at / Tile::kChunks;
    if (!is_clean(row)) ptx::store_shared(to + Tile::offset(row, at % Tile::kChunks), uint4{});
  }
}

// The segments of each step's rows, and of each consumer warp's keys.
template <int kStages, int kWarps>
struct StepSegments {
  SegmentRange rows[kStages], keys[kWarps];
};
struct NoSegments {};
struct NoWalkPipe {};

// Whether a kernel stages segments in shared memory.
template <class C>
inline constexpr bool kStagesSegments = C::kCluster == 1 && C::Score::reads(Operand::kQSegmentIds);

template <class C>
struct BackwardShared {
  static constexpr int kConsumers = C::kConsumers, kStages = C::kStages;
  alignas(1024) uint8_t k[C::kKeyStages][C::KTile::kBytes];
  alignas(1024) uint8_t v[C::kValueStages][C::VTile::kBytes];
  alignas(1024) uint8_t q[kStages][C::QTile::kBytes];
  alignas(1024) uint8_t d_out[kStages][C::DoTile::kBytes];
  alignas(1024) uint8_t ds[C::kDsStages][C::DsTile::kBytes];  // dSᵀ
  [[no_unique_address]] typename C::Kept kept;
  [[no_unique_address]] typename C::Tiles::Buffer score_tiles;  // bias and mask
  QueryStatistics<C::kM> statistics[kStages];
  int32_t large_lse[kStages];  // bit 0: some lse_too_large(); other bits: is_partial_of()
  [[no_unique_address]] StepRing<kListsSteps<C>> step_ring;
  using Segments =
      std::conditional_t<kStagesSegments<C>, StepSegments<kStages, kConsumers * kConsumerWarps>, NoSegments>;
  [[no_unique_address]] Segments segments;
  using Tile = KeyTileState<typename C::Element, kConsumers, ScoreOperandsOf<C::kKind>, typename C::DqRows>;
  Tile tiles[kKeyTileStates<C>];
  Pipeline<kKeyTileStates<C>> state_pipe;
  [[no_unique_address]] std::conditional_t<C::kLoadsEarly, Pipeline<kKeyTileStates<C>>, NoWalkPipe>
      walk_pipe;                         // full when the thread that loads may read the state; never released
  Pipeline<1> ending_pipe;               // full when the load thread is about to end a key tile
  Pipeline<C::kKeyStages> key_pipe;      // K, and V unless it is apart
  Pipeline<C::kValueStages> value_pipe;  // released before the last dQ, which reads K
  Pipeline<kStages> q_pipe, do_pipe;
  Pipeline<kStages> ready_pipe;    // full when Q and dO are loaded and clean, and lse and delta stored
  Pipeline<C::kDsStages> ds_pipe;  // dSᵀ of both consumers, which release it if kReleasesDs
  // If sums are ordered: full when consumers may add dQ of a step, empty when they have. Consumers are at
  // most two tickets behind.
  Pipeline<C::kOrdered ? 2 << kMostTicketShift : 1> sum_pipe;
  [[no_unique_address]] typename C::Tiles::Pipe score_pipe;

  // K and V of a key tile.
  __device__ __forceinline__ uint8_t* keys(uint32_t tile) { return k[tile % C::kKeyStages]; }
  __device__ __forceinline__ uint8_t* values(uint32_t tile) { return v[tile % C::kValueStages]; }
  // Consumers call this after the last step, before its dQ.
  __device__ __forceinline__ void release_values(uint32_t tile) {
    if constexpr (C::kValuesApart) value_pipe.release(tile);
  }

  __device__ __forceinline__ void init() {
    constexpr uint32_t kConsumer = kConsumerWarps * ptx::kWarpArrivals;
    state_pipe.init(kConsumers * kConsumer + ptx::kWarpArrivals + (C::kOrdered ? 2 : 1) +
                    (kStagesTiles<C> ? ptx::kWarpArrivals : 0));  // also counts the other producers
    if constexpr (C::kLoadsEarly) walk_pipe.init(1);
    ending_pipe.init(1);
    key_pipe.init(kConsumers * kConsumer);
    value_pipe.init(kConsumers * kConsumer);
    q_pipe.init(kConsumers * kConsumer);
    do_pipe.init(kConsumers * kConsumer);
    ready_pipe.init(kConsumers * kConsumer, ptx::kWarpArrivals);
    ds_pipe.init(kConsumers * kConsumer, kConsumers * kConsumer);
    sum_pipe.init(kConsumers * kConsumer);
    score_pipe.init(kConsumers * kConsumer);
    ptx::fence_barriers();
  }
};

}  // namespace jax_flash
