// Shared memory of cuda/forward/hopper.cuh: the states of query tiles, tiles of Q, K and V, pipelines.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/forward/hopper_query_tile.cuh"
#include "cuda/forward/hopper_widen.cuh"
#include "cuda/hopper/pipeline.cuh"
#include "cuda/hopper/roles.cuh"
#include "cuda/hopper/tile_scheduler.cuh"

namespace jax_flash {

// A team's shared memory. Input: what the score variant stages per key tile.
template <class T, class QTile, class KTile, class VTile, int kKeyStages, int kValueStages, int kConsumers,
          int kOwners, int kKeyParts, int kKeyCluster, class Input, int kMulticast, class Output,
          class Ranges, class Slice, class Mailbox, class Exchange, class Stored>
struct ForwardShared : Input::Buffer {
  alignas(1024) uint8_t q[kOwners][QTile::kBytes];
  alignas(1024) uint8_t k[kKeyStages][KTile::kBytes];
  alignas(1024) uint8_t v[kValueStages][VTile::kBytes];
  [[no_unique_address]] Stored stored;  // K and V of float8 pages, before they are widened
  [[no_unique_address]] typename Output::Tiles o;
  [[no_unique_address]] Exchange exchange;  // of P between CTAs that share the query tile
  using Tile = TileState<T, kConsumers, Ranges, Slice>;
  Tile tiles[kTileStates];
  // state_pipe: full when the state is complete or, with kEarlyLoad, when begin()'s part is.
  Pipeline<kTileStates> state_pipe;
  Pipeline<kTileStates> consumer_pipe;  // with kEarlyLoad: full when prepare() is done
  Pipeline<kTileStates> epilogue_pipe;  // with kEarlyLoad: full when prepare_outputs() is done
  Pipeline<1> ending_pipe;              // full when the load warp comes to the end of a query tile
  Pipeline<1> q_pipe[kOwners];
  Pipeline<kKeyStages> k_pipe;
  Pipeline<kValueStages> v_pipe;
  typename Input::Pipe input_pipe;
  [[no_unique_address]] typename Ranges::template Pieces<kKeyStages> pieces;  // of listed key tiles
  [[no_unique_address]] typename Output::Pipes out_pipe;
  [[no_unique_address]] Mailbox mailbox;

  // Stages of K and V. A K tile has a stage for each part of its columns. If V is K, the CTA's own columns
  // are the last parts, in V's stage, which is released after P V.
  static constexpr uint32_t key_use(uint32_t use, int part) { return use * kKeyParts + part; }
  __device__ __forceinline__ const uint8_t* key(uint32_t use, int part = 0) const {
    return part < kKeyParts ? k[key_use(use, part) % kKeyStages]
                            : value(use) + (part - kKeyParts) * KTile::kBytes;
  }
  __device__ __forceinline__ const uint8_t* value(uint32_t use) const { return v[use % kValueStages]; }
  __device__ __forceinline__ void wait_key(uint32_t use, int part = 0) const {
    if (part >= kKeyParts) return wait_value(use);
    k_pipe.wait_full(key_use(use, part));
  }
  __device__ __forceinline__ void wait_value(uint32_t use) const { v_pipe.wait_full(use); }
  __device__ __forceinline__ void release_key(uint32_t use, int part = 0) const {
    if (part >= kKeyParts) return;
    const uint32_t stage = key_use(use, part);
    k_pipe.template release<kKeyCluster>(stage, key_loader(stage));
  }
  __device__ __forceinline__ void release_value(uint32_t use) const {
    v_pipe.template release<kMulticast>(use, kValueLoader);
  }
  // The stages that TMA loads K and V into.
  __device__ __forceinline__ auto& arriving() {
    if constexpr (std::is_same_v<Stored, NoStoredTiles>) {
      return *this;
    } else {
      return stored;
    }
  }
  // The CTA that multicasts K. Parts take turns, but a stage always has the same CTA, where it is released.
  static constexpr uint32_t key_loader(uint32_t stage) {
    return kKeyParts > 1 ? stage % kKeyStages % 2 : kKeyLoader;
  }

  // `state_releases`: producers' arrivals that release a tile state.
  __device__ __forceinline__ void init(uint32_t state_releases) {
    constexpr uint32_t kConsumer = kConsumerWarps * ptx::kWarpArrivals;
    state_pipe.init(kConsumers * kConsumer + state_releases);
    consumer_pipe.init(1);
    epilogue_pipe.init(1);
    ending_pipe.init(1);
    for (auto& pipe : q_pipe) pipe.init(kConsumer);
    k_pipe.init(kOwners * kConsumer * kKeyCluster, Stored::kArrivals);
    v_pipe.init(kConsumers * kConsumer * kMulticast, Stored::kArrivals);
    stored.init();
    input_pipe.init(kOwners * kConsumer);
    out_pipe.init(kConsumer);
    mailbox.init();
    exchange.init(kConsumer);
    ptx::fence_barriers();
  }
};

}  // namespace jax_flash
