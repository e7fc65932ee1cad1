// Shared memory of cuda/backward/hopper_cluster.cuh.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/families/hopper_layout.h"
#include "cuda/backward/hopper_state.cuh"
#include "cuda/hopper/sum_parts.cuh"
#include "cuda/hopper/tile_scheduler.cuh"

namespace jax_flash {

// The index of the 64 keys of a tile that CTA `rank` works on.
template <class C>
__device__ __forceinline__ int32_t key_part(uint32_t rank) {
  return C::kKeyParts == 1 ? 0 : static_cast<int32_t>(rank);
}

// The first column of the head that this CTA works on. It works on two tiles `Half` of columns.
template <class C, class Half>
__device__ __forceinline__ int32_t first_own_column() {
  return C::kSplitsColumns ? static_cast<int32_t>(ptx::cluster_rank()) * 2 * Half::kColumns : 0;
}

// CTAs that split the keys send each other dSᵀ. ds: full when dSᵀ of the other CTA's keys has arrived.
template <class C>
struct KeyOwnerParts {
  Pipeline<C::kDsStages> ds;

  __device__ __forceinline__ void init(uint32_t) { ds.init(1); }
};

// CTAs that split the columns send each other their parts of Sᵀ and dPᵀ.
template <class C>
struct ColumnOwnerParts {
  SumParts<typename C::S, 1> s, dp;

  __device__ __forceinline__ void init(uint32_t releases) {
    s.init(releases);
    dp.init(releases);
  }
};

struct NoParts {
  __device__ __forceinline__ void init(uint32_t) {}
};
template <class C>
using PartsOf = std::conditional_t<C::kSplitsColumns, ColumnOwnerParts<C>,
                                   std::conditional_t<(C::kKeyParts > 1), KeyOwnerParts<C>, NoParts>>;

template <class C>
struct BackwardClusterShared {
  static constexpr int kStages = C::kStages, kDoStages = C::kDoStages, kDsStages = C::kDsStages;
  alignas(1024) uint8_t k[2][C::KHalf::kBytes];  // this CTA's keys and columns
  // The other CTA's keys, in the columns of dQ that this CTA computes.
  alignas(1024) uint8_t k_other[C::kKeyParts == 1 ? 0 : C::KHalf::kBytes];
  alignas(1024) uint8_t v[2][C::VHalf::kBytes];
  alignas(1024) uint8_t q[kStages][2][C::QHalf::kBytes];
  alignas(1024) uint8_t d_out[kDoStages][C::DoHalf::kBytes];
  // Pᵀ of this CTA's keys, which dSᵀ replaces; then also dSᵀ of the other CTA's keys.
  alignas(1024) uint8_t ds[kDsStages][C::DsTile::kBytes];
  alignas(1024) float dq[C::kDqByTma ? kConsumerRows * C::kDqColumns : 0];
  [[no_unique_address]] typename C::Tiles::Buffer score_tiles;  // bias and mask of this CTA's keys
  [[no_unique_address]] PartsOf<C> parts;
  QueryStatistics<C::kM> statistics[kStages];
  int32_t large_lse[kStages];  // bit 0: some lse_too_large(); other bits: is_partial_of()
  [[no_unique_address]] StepRing<kListsSteps<C>> step_ring;
  using Tile = KeyTileState<typename C::Element, C::kKeyParts, ScoreOperandsOf<C::kKind>>;
  Tile tiles[kKeyTileStates<C>];
  TileMailbox mailbox;
  Pipeline<kKeyTileStates<C>> state_pipe;
  Pipeline<1> ending_pipe;  // full when at most 4 steps of a key tile are left to load
  Pipeline<1> k_pipe, v_pipe;
  Pipeline<kStages> q_pipe;      // a stage is released in all kKeyParts CTAs that load it
  Pipeline<kDoStages> do_pipe;   // likewise; a stage is half of the columns of dO
  Pipeline<kStages> lse_pipe;    // full when lse is stored, and Q clean
  Pipeline<kStages> delta_pipe;  // full when delta is stored, and dO clean
  // Full when Pᵀ is stored, released after the wgmma of dQ that reads the dSᵀ in its place, in both CTAs if
  // they split the keys.
  Pipeline<kDsStages> p_pipe;
  Pipeline<kDsStages> ds_pipe;  // full when dSᵀ of this CTA's keys is stored; p_pipe releases it
  [[no_unique_address]] typename C::Tiles::Pipe score_pipe;

  __device__ __forceinline__ void init() {
    constexpr uint32_t kConsumer = kConsumerWarps * ptx::kWarpArrivals;
    mailbox.init();
    state_pipe.init(C::kConsumers * kConsumer + ptx::kWarpArrivals + 2);  // 2: the threads that load
    ending_pipe.init(1);
    k_pipe.init(2 * kConsumer);
    v_pipe.init(kConsumer);
    q_pipe.init(C::kKeyParts * 2 * kConsumer);
    do_pipe.init(C::kKeyParts * 2 * kConsumer);
    lse_pipe.init(kConsumer, ptx::kWarpArrivals);
    delta_pipe.init(2 * kConsumer, ptx::kWarpArrivals);
    p_pipe.init(C::kKeyParts * kConsumer, kConsumer);
    ds_pipe.init(1, kConsumer);
    parts.init(kConsumer);
    score_pipe.init(kConsumer);
    ptx::fence_barriers();
  }
};

}  // namespace jax_flash
