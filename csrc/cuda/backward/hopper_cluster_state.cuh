// Shared memory of cuda/backward/hopper_cluster.cuh.
#pragma once

#include <cstdint>

#include "core/families/hopper_layout.h"
#include "cuda/backward/hopper_state.cuh"
#include "cuda/hopper/tile_scheduler.cuh"

namespace jax_flash {

template <class C>
struct BackwardClusterShared {
  static constexpr int kStages = C::kStages, kDoStages = C::kDoStages, kDsStages = C::kDsStages;
  alignas(1024) uint8_t k[2][C::KHalf::kBytes];     // this CTA's keys
  alignas(1024) uint8_t k_other[C::KHalf::kBytes];  // the other CTA's keys, the columns of this CTA's dQ
  alignas(1024) uint8_t v[2][C::VHalf::kBytes];
  alignas(1024) uint8_t q[kStages][2][C::QHalf::kBytes];
  alignas(1024) uint8_t d_out[kDoStages][C::DoHalf::kBytes];
  // Pᵀ of this CTA's keys, then dSᵀ of both CTAs' keys.
  alignas(1024) uint8_t ds[kDsStages][C::DsTile::kBytes];
  alignas(1024) uint8_t dq[C::kDqByTma ? C::DqBlock::kBytes * C::kDqColumns / kAccumulatorBlock : 0];
  [[no_unique_address]] typename C::Tiles::Buffer score_tiles;  // bias and mask of this CTA's keys
  QueryStatistics<C::kM> statistics[kStages];
  int32_t large_lse[kStages];  // whether the rounding of some lse would show in P
  [[no_unique_address]] StepRing<C::kKind == ScoreKind::kBlocks> step_ring;
  using Tile = KeyTileState<typename C::Element, C::kCluster, ScoreOperandsOf<C::kKind>>;
  Tile tiles[kKeyTileStates];
  TileMailbox mailbox;
  Pipeline<kKeyTileStates> state_pipe;
  Pipeline<1> ending_pipe;  // full when the load thread is about to end a key tile
  Pipeline<1> k_pipe, v_pipe;
  Pipeline<kStages> q_pipe;           // in both CTAs at once
  Pipeline<kDoStages> do_pipe;        // likewise, a half at a time
  Pipeline<kStages> lse_pipe;         // full when lse is stored, and Q clean
  Pipeline<kStages> delta_pipe;       // full when delta is stored, and dO clean
  Pipeline<kDsStages> p_pipe;         // Pᵀ; empty when both CTAs have multiplied the dSᵀ that took its place
  Pipeline<kDsStages> ds_pipe;        // dSᵀ of this CTA's keys
  Pipeline<kDsStages> ds_other_pipe;  // of the other's
  [[no_unique_address]] typename C::Tiles::Pipe score_pipe;

  __device__ __forceinline__ void init() {
    constexpr uint32_t kConsumer = kConsumerWarps * ptx::kWarpArrivals;
    mailbox.init();
    state_pipe.init(C::kConsumers * kConsumer + ptx::kWarpArrivals + 2);  // and the other producers
    ending_pipe.init(1);
    k_pipe.init(2 * kConsumer);
    v_pipe.init(kConsumer);
    q_pipe.init(C::kCluster * 2 * kConsumer);
    do_pipe.init(C::kCluster * 2 * kConsumer);
    lse_pipe.init(kConsumer, ptx::kWarpArrivals);
    delta_pipe.init(2 * kConsumer, ptx::kWarpArrivals);
    p_pipe.init(C::kCluster * kConsumer, kConsumer);
    ds_pipe.init(1, kConsumer);
    ds_other_pipe.init(1);
    score_pipe.init(kConsumer);
    ptx::fence_barriers();
  }
};

}  // namespace jax_flash
