// The producer warps of cuda/backward/hopper_cluster.cuh.
#pragma once

#include <cstdint>

#include "cuda/backward/hopper_cluster_state.cuh"
#include "cuda/backward/hopper_load.cuh"

namespace jax_flash {

template <class C>
struct ClusterGradientProducer : GradientProducer<C> {
  using Base = GradientProducer<C>;
  using Tile = typename Base::Tile;
  using QHalf = typename C::QHalf;
  using VHalf = typename C::VHalf;
  using DoHalf = typename C::DoHalf;
  using Base::for_steps, Base::maps, Base::p, Base::shared, Base::step_use, Base::tile_index;

  // Multicasts this CTA's half of the rows of a tile to both CTAs. `column`: the tile's first column.
  template <class TileShape>
  __device__ __forceinline__ static void load_for_both(const uint8_t* to, const CUtensorMap& map,
                                                       uint32_t full, ptx::Coordinates at, int32_t column) {
    constexpr int kRows = TileShape::kRows / C::kCluster, kColumns = TileShape::kPanel * 8;
    const int32_t first = static_cast<int32_t>(ptx::cluster_rank()) * kRows;
    at.row += first;
#pragma unroll
    for (int i = 0; i < TileShape::kColumns; i += kColumns) {
      at.column = column + i;
      ptx::copy_box_to((1 << C::kCluster) - 1,
                       ptx::shared_address(to) + TileShape::panel_offset(i / 8) + first * TileShape::kPitch,
                       map, full, at);
    }
  }

  // Issues the TMA loads of one half of the columns of a tile of Q or dO. CTAs that split the keys need the
  // same half of the head's columns, which is multicast. Otherwise it is half of this CTA's own columns.
  template <class Half>
  __device__ __forceinline__ static void load_query_half(const uint8_t* to, const CUtensorMap& map,
                                                         uint32_t full, ptx::Coordinates at, int half) {
    if constexpr (C::kKeyParts == 1) {
      load_half<Half>(to, map, full, at, half);
    } else {
      load_for_both<Half>(to, map, full, at, half * Half::kColumns);
    }
  }

  // One thread loads Q of the first step, K, then Q of the other steps.
  __device__ __forceinline__ void load_queries() {
    for_steps(
        [&](const Tile& tile, const QueryStep& step) {
          const BlockWork& work = tile.work;
          const uint32_t use = step.number;
          const ptx::Coordinates at =
              coordinates_of(p.query, work, work.head + step.head, work.tile.q_begin + step.tile * C::kM);
          shared.q_pipe.wait_empty(use);
          ptx::barrier_expect(shared.q_pipe.full_barrier(use), 2 * QHalf::kBytes);
#pragma unroll
          for (int half = 0; half < 2; ++half)
            load_query_half<QHalf>(shared.q[use % C::kStages][half], maps.query,
                                   shared.q_pipe.full_barrier(use), at, half);
          if (use == step_use) load_k(tile);
          if (this->ends_soon(tile, step)) shared.ending_pipe.arrive(tile_index);
        },
        [&](const Tile& tile) {
          if (tile.walk.tiles.empty()) {
            shared.ending_pipe.arrive(tile_index);
            shared.k_pipe.wait_empty(tile_index);
            shared.k_pipe.arrive(tile_index);
          }
          shared.state_pipe.release_by_thread(tile_index);
        });
  }

  // One thread loads dO of the first step, V, then dO of the other steps.
  __device__ __forceinline__ void load_douts() {
    for_steps(
        [&](const Tile& tile, const QueryStep& step) {
          const BlockWork& work = tile.work;
          const ptx::Coordinates at =
              coordinates_of(p.dout, work, work.head + step.head, work.tile.q_begin + step.tile * C::kM);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const uint32_t use = 2 * static_cast<uint32_t>(step.number) + half;
            const uint32_t full = shared.do_pipe.full_barrier(use);
            shared.do_pipe.wait_empty(use);
            ptx::barrier_expect(full, DoHalf::kBytes);
            load_query_half<DoHalf>(shared.d_out[use % C::kDoStages], maps.dout, full, at, half);
          }
          if (static_cast<uint32_t>(step.number) == step_use) load_v(tile);
        },
        [&](const Tile& tile) {
          if (tile.walk.tiles.empty()) {
            shared.v_pipe.wait_empty(tile_index);
            shared.v_pipe.arrive(tile_index);
          }
          shared.state_pipe.release_by_thread(tile_index);
        });
  }

  // The first key of CTA `rank`, as a row of the operand.
  __device__ __forceinline__ static int32_t first_key(const Tile& tile, uint32_t rank) {
    return tile.work.tile.k_begin + tile.work.tile.row + key_part<C>(rank) * kConsumerRows;
  }

  // Loads one half of this CTA's columns, of the 64 rows that begin at `at`.
  template <class Half>
  __device__ __forceinline__ static void load_half(const uint8_t* to, const CUtensorMap& map, uint32_t full,
                                                   ptx::Coordinates at, uint32_t half) {
    constexpr int kColumns = Half::kPanel * 8;
#pragma unroll
    for (int i = 0; i < Half::kColumns; i += kColumns) {
      at.column = first_own_column<C, Half>() + static_cast<int32_t>(half) * Half::kColumns + i;
      ptx::copy_box(ptx::shared_address(to) + Half::panel_offset(i / 8), map, full, at);
    }
  }

  __device__ __forceinline__ void load_k(const Tile& tile) const {
    using KHalf = typename C::KHalf;
    const uint32_t rank = ptx::cluster_rank(), full = shared.k_pipe.full_barrier(tile_index);
    ptx::Coordinates at = coordinates_of(p.key, tile.work, tile.kv_head, 0);
    shared.k_pipe.wait_empty(tile_index);
    ptx::barrier_expect(full, (C::kKeyParts == 1 ? 2 : 3) * KHalf::kBytes);
    at.row = first_key(tile, rank);
    load_half<KHalf>(shared.k[0], maps.key, full, at, 0);
    load_half<KHalf>(shared.k[1], maps.key, full, at, 1);
    if constexpr (C::kKeyParts > 1) {
      at.row = first_key(tile, 1 - rank);
      load_half<KHalf>(shared.k_other, maps.key, full, at, rank);
    }
  }

  __device__ __forceinline__ void load_v(const Tile& tile) const {
    const uint32_t full = shared.v_pipe.full_barrier(tile_index);
    shared.v_pipe.wait_empty(tile_index);
    ptx::barrier_expect(full, 2 * VHalf::kBytes);
    const ptx::Coordinates at =
        coordinates_of(p.value, tile.work, tile.kv_head, first_key(tile, ptx::cluster_rank()));
    load_half<VHalf>(shared.v[0], maps.value, full, at, 0);
    load_half<VHalf>(shared.v[1], maps.value, full, at, 1);
  }

  __device__ __forceinline__ static int lane() { return static_cast<int>(ptx::lane_index()); }

  // Q ← 0 in rows that are not in use, since they may hold NaN.
  __device__ __forceinline__ void clear_queries(const Tile& tile, const QueryStep& step, bool some) const {
    this->if_unclean(tile, step, some, [&](auto is_clean) {
      shared.q_pipe.wait_full(step.number);
#pragma unroll 1
      for (int half = 0; half < 2; ++half)
        clear_rows<QHalf>(shared.q[step.number % C::kStages][half], is_clean, lane(), 32);
      ptx::fence_async_shared();
    });
  }
  // dO ← 0 likewise.
  __device__ __forceinline__ void clear_douts(const Tile& tile, const QueryStep& step, bool some) const {
    this->if_unclean(tile, step, some, [&](auto is_clean) {
#pragma unroll 1
      for (int half = 0; half < 2; ++half) {
        const uint32_t use = 2 * static_cast<uint32_t>(step.number) + half;
        shared.do_pipe.wait_full(use);
        clear_rows<DoHalf>(shared.d_out[use % C::kDoStages], is_clean, lane(), 32);
      }
      ptx::fence_async_shared();
    });
  }

  // One warp loads bias, mask, lse and delta. Rows that see no key get an lse that makes their P = 0.
  __device__ __forceinline__ void load_statistics() {
    for_steps(
        [&](const Tile& tile, const auto& step) {
          if constexpr (C::Tiles::kStaged)
            this->load_score_tile(tile, step, first_key(tile, ptx::cluster_rank()) - tile.work.tile.k_begin);
          const uint32_t use = step.number, stage = use % C::kStages;
          const auto fetch = [&](int32_t i) {
            const bool used = tile.seen.contains(i);
            return float2{used ? tile.lse[step.head * p.lse.head + i * p.lse.row] : -INFINITY,
                          used ? tile.delta[step.head * p.delta.head + i * p.delta.row] : 0};
          };
          const int32_t row = step.tile * C::kM + lane();
          const float2 first = fetch(row), second = fetch(row + 32);
          const uint32_t partial = this->template partial_consumers<1>(tile, step, [&](int32_t) {
            return first_key(tile, ptx::cluster_rank()) - tile.work.tile.k_begin;
          });
          shared.lse_pipe.wait_empty(use);
          const bool large_lse = lse_too_large(row_lse(first.x)) || lse_too_large(row_lse(second.x));
          auto& [lse, delta] = shared.statistics[stage];
          lse[lane()] = row_lse(first.x), lse[lane() + 32] = row_lse(second.x);
          const bool any_large_lse = __any_sync(~0u, large_lse);
          if (lane() == 0) shared.large_lse[stage] = any_large_lse | partial << 1, shared.step_ring.put(step);
          const bool unseen = __any_sync(~0u, first.x == -INFINITY || second.x == -INFINITY);
          clear_queries(tile, step, unseen);
          ptx::barrier_arrive_by_warp(shared.lse_pipe.full_barrier(use));
          shared.delta_pipe.wait_empty(use);
          delta[lane()] = row_delta(first.x, first.y), delta[lane() + 32] = row_delta(second.x, second.y);
          clear_douts(tile, step, unseen);
          ptx::barrier_arrive_by_warp(shared.delta_pipe.full_barrier(use));
        },
        [&](const Tile&) { shared.state_pipe.release(tile_index); });
  }
};

}  // namespace jax_flash
