// The load warp of cuda/forward/hopper.cuh: Q, K, V and tiles of a bias, by TMA.
#pragma once

#include <cstdint>

#include "cuda/forward/hopper_heads.cuh"
#include "cuda/forward/hopper_state.cuh"
#include "cuda/hopper/roles.cuh"
#include "cuda/hopper/tma.cuh"
#include "cuda/load/hopper_dense.cuh"

namespace jax_flash {

// The first Loader::kLanes lanes of Loader::kWarps warps run this, beginning with the team's second warp. If
// there are two warps, the first loads K, and the second loads Q, the score inputs and V.
template <class C>
struct LoadWarp {
  using Loader = typename C::Loader;
  const Problem& p;
  const typename C::Maps& maps;
  typename C::Shared& shared;
  Loader loader{p};
  uint32_t kv_index = 0;  // key tiles loaded so far

  // The thread that loads Q and signals the tile scheduler.
  static __device__ __forceinline__ bool leads() {
    return threadIdx.x % kTeamProducers<C::kTeams> == 32 * Loader::kWarps;
  }

  // n: the tile's number, or the pieces of a listed tile.
  template <class N>
  __device__ __forceinline__ void load_key(const N& n, uint32_t use) {
#pragma unroll
    for (int part = 0; part < C::kLoadedParts; ++part) {
      auto& to = shared.arriving();
      const uint32_t stage = to.key_use(use, part), from = to.key_loader(stage);
      to.k_pipe.template wait_empty<C::kKeyCluster>(stage, from);
      if constexpr (C::kWidens) loader.share_scales(maps.keys, to.key_scales(use));
      loader.load_key(maps.keys, ptx::shared_address(to.key(use, part)), to.k_pipe.full_barrier(stage), n,
                      part, from);
    }
  }

  template <class N>
  __device__ __forceinline__ void load_value(const N& n, uint32_t use) {
    auto& to = shared.arriving();
    to.v_pipe.template wait_empty<C::kMulticast>(use, kValueLoader);
    if constexpr (C::kWidens) loader.share_scales(maps.keys, to.value_scales(use));
    loader.load_value(maps.keys, ptx::shared_address(to.value(use)), to.v_pipe.full_barrier(use), n);
  }

  __device__ __forceinline__ void load_input(const BlockWork& work, int32_t n, uint32_t use) {
    if constexpr (C::Input::kLoaded) C::Input::load(shared, maps.input, p, work, n, use);
  }

  __device__ __forceinline__ void load_query(const BlockWork& work, bool used, int32_t consumer,
                                             uint32_t tile_index) {
    using Tile = typename C::QTile;
    if (!leads()) return;
    const int slot = C::kSharers > 1 ? 0 : consumer;
    auto& pipe = shared.q_pipe[slot];
    pipe.wait_empty(tile_index);
    const uint32_t full = pipe.full_barrier(tile_index);
    if (!used) return ptx::barrier_arrive(full);
    const auto& tile = shared.tiles[tile_index % kTileStates];
    const int32_t row = work.tile.row + tile.rows_before(consumer);
    ptx::barrier_expect(full, Tile::kBytes);
    ptx::Coordinates at;
    if constexpr (C::kPacksHeads) {
      at = packed_coordinates(p, work, row);
    } else {
      at = coordinates_of(p.query, work, work.head + tile.heads_before(consumer), work.tile.q_begin + row);
    }
    const uint32_t to = ptx::shared_address(shared.q[slot]);
    if constexpr (C::kSharedValues) {  // in the order of K's columns
      using Half = SharedTile<typename C::Element, Tile::kRows, C::kValueDim>;
      at.column = first_key_column<C>(tile.column);
      load_rows<Half>(to, 0, maps.query, full, at);
      at.column = tile.column;
      load_rows<Half>(to + Half::kBytes, 0, maps.query, full, at);
    } else {
      load_rows<Tile>(to, 0, maps.query, full, at);
    }
  }

  // The tile scheduler takes the next query tile when this many key tiles are left to load. The number is
  // small, because a CTA that reserves a tile long before it begins may finish after all other CTAs. Three
  // consumers are faster, so they need more. Teams, and CTAs that share tiles, which need long to agree, take
  // the next tile at once.
  static constexpr int32_t kTilesLeft = C::kTeams > 1 || C::kSharers > 1 ? INT32_MAX / 2
                                        : C::kConsumers <= 2             ? 1
                                                                         : 4;

  // Loads K, Q, then K, V, K, V … V: the order in which consumers wait for them.
  template <bool kKeys, bool kValues>
  __device__ __forceinline__ void load(const BlockWork& work, const Interval& tiles, uint32_t tile_index) {
    const auto& tile = shared.tiles[tile_index % kTileStates];
    const auto tile_of = [&](int32_t n) { return tile.tile(n); };
    const auto look_up = [&](int32_t n) {
      if constexpr (C::kWidens) {
        loader.look_up(maps.keys, n, tile_of, kKeys ? p.k_scale : p.v_scale);
      } else {
        loader.look_up(maps.keys, n, tile_of);
      }
    };
    const auto key = [&](int32_t n, uint32_t use) {
      look_up(n);
      load_key(tile.tile(n), use);
    };
    const bool used = !tiles.empty();
    if (used) loader.begin(maps.keys, work, tiles.hi - 1, tile_of);
    if constexpr (C::kHasColumns) loader.begin_columns(tile.column);
    if (kKeys && used) key(tiles.hi - 1, kv_index);
    if constexpr (kValues) {
      if constexpr (C::kSharers > 1) {
        load_query(work, used, static_cast<int>(ptx::cluster_rank()), tile_index);
      } else {
        for (int i = 0; i < C::kConsumers; ++i) load_query(work, used, i, tile_index);
      }
      if (used) load_input(work, tile.tile(tiles.hi - 1), kv_index);
      if (!used && leads()) shared.ending_pipe.arrive(tile_index);
    }
    const int32_t takes_next = min(tiles.hi - 1, tiles.lo + kTilesLeft);
    for (int32_t n = tiles.hi - 1; n >= tiles.lo; --n, ++kv_index) {
      if (kValues && n == takes_next && leads()) shared.ending_pipe.arrive(tile_index);
      if (kKeys && n > tiles.lo) key(n - 1, kv_index + 1);
      if constexpr (kValues) {
        look_up(n);
        load_value(tile.tile(n), kv_index);
        if (n > tiles.lo) load_input(work, tile.tile(n - 1), kv_index + 1);
      }
    }
  }

  // The pieces of a listed key tile, which consumers read as well.
  __device__ __forceinline__ KeyPieces& pieces(uint32_t use) const { return shared.pieces.of_use(use); }

  // load() for listed key tiles. The pieces of a tile are fetched one step before they are needed.
  __device__ __forceinline__ void load_listed(const BlockWork& work, const Interval& tiles,
                                              uint32_t tile_index) {
    const auto& tile = shared.tiles[tile_index % kTileStates];
    const bool used = !tiles.empty();
    const auto fetch = [&](int32_t n) {
      return __ldg(reinterpret_cast<const int4*>(tile.list) + max(n, tiles.lo));
    };
    const auto share = [&](const int4& x, uint32_t use) { reinterpret_cast<int4&>(pieces(use)) = x; };
    int4 next;
    if (used) {
      loader.begin(work, tile.keys_of_piece);
      share(fetch(tiles.hi - 1), kv_index);
      load_key(pieces(kv_index), kv_index);
      next = fetch(tiles.hi - 2);
    }
    for (int i = 0; i < C::kConsumers; ++i) load_query(work, used, i, tile_index);
    if (!used) shared.ending_pipe.arrive(tile_index);
    const int32_t takes_next = min(tiles.hi - 1, tiles.lo + kTilesLeft);
    for (int32_t n = tiles.hi - 1; n >= tiles.lo; --n, ++kv_index) {
      if (n == takes_next) shared.ending_pipe.arrive(tile_index);
      if (n > tiles.lo) {
        share(next, kv_index + 1);
        next = fetch(n - 2);
        load_key(pieces(kv_index + 1), kv_index + 1);
      }
      load_value(pieces(kv_index), kv_index);
    }
  }

  template <bool kKeys, bool kValues>
  __device__ __forceinline__ void run() {
    for (uint32_t tile_index = 0;; ++tile_index) {
      shared.state_pipe.wait_full(tile_index);
      const auto& tile = shared.tiles[tile_index % kTileStates];
      const Interval tiles = tile.done ? Interval{0, 0} : tile.tiles;
      if constexpr (C::kListed) {
        load_listed(tile.work, tiles, tile_index);
      } else {
        load<kKeys, kValues>(tile.work, tiles, tile_index);
      }
      if (tile.done) return;
      loader.release(shared.state_pipe, tile_index);
    }
  }

  __device__ __forceinline__ void run() {
    if (leads()) {
      ptx::prefetch_map(maps.keys.key);
      ptx::prefetch_map(maps.query);
      ptx::prefetch_map(maps.keys.value);
    }
    if constexpr (Loader::kWarps == 1) {
      run<true, true>();
    } else if (threadIdx.x / 32 == 1) {
      run<true, false>();
    } else {
      run<false, true>();
    }
  }
};

}  // namespace jax_flash
