// The consumer warpgroup of cuda/backward/hopper_cluster.cuh that adds up dQ.
#pragma once

#include <cstdint>

#include "cuda/backward/hopper_cluster_consumer.cuh"
#include "cuda/backward/hopper_sums.cuh"
#include "cuda/backward/hopper_tickets.cuh"
#include "cuda/ptx/atomic.cuh"
#include "cuda/ptx/tma.cuh"

namespace jax_flash {

// Computes dQ = dS K in this CTA's half of the columns, with all keys of the tile.
template <class C>
struct QueryGradientConsumer : ClusterConsumer<C> {
  using Base = ClusterConsumer<C>;
  using Base::Base, Base::p, Base::shared, Base::grid, Base::tile, Base::tile_index;
  using typename Base::DsTile, typename Base::KHalf, typename Base::T;

  static constexpr int kOwnColumns = C::HeadDim / C::kCluster;

  __device__ __forceinline__ static bool leads() { return ptx::thread_index() % kWarpgroup == 0; }

  // In a deterministic call key tiles add to dQ in order. One ticket orders a few query tiles or heads,
  // because it costs a wait for memory and a fence. The counter of the ticket's first tile counts the parts
  // that have been added: one per CTA of a cluster if TMA adds, else one per warp.
  static constexpr uint32_t kParts = C::kCluster * (C::kDqByTma ? 1 : kConsumerWarps);
  uint32_t* ticket = nullptr;  // the counter of a finished ticket that has not been passed on yet

  // Whether a step is the first, or the last, of its ticket. Steps go over the query tiles, and over the
  // heads within each tile.
  __device__ __forceinline__ bool begins_ticket(const QueryStep& step) const {
    return step.head % kTicketSteps == 0 && leaves_ticket(step, -uniform(tile().walk.direction));
  }
  __device__ __forceinline__ bool ends_ticket(const QueryStep& step) const {
    const bool last_head = (step.head + 1) % kTicketSteps == 0 || step.head == uniform(tile().walk.heads) - 1;
    return last_head && leaves_ticket(step, uniform(tile().walk.direction));
  }
  // Whether the query tile in a direction belongs to another ticket, or is not one of the walk.
  __device__ __forceinline__ bool leaves_ticket(const QueryStep& step, int32_t direction) const {
    const int32_t other = step.tile + direction;
    return ticket_of(grid, step) != other >> grid.ticket_shift || !uniform(tile().walk.tiles).contains(other);
  }
  __device__ __forceinline__ uint32_t* count(const QueryStep& step) const {
    return count_of(grid, tile(), step, step.head / kTicketSteps * kTicketSteps);
  }
  __device__ __forceinline__ void wait_ticket(const QueryStep& step) const {
    if (C::kDqByTma && this->warp_row() > 0) return;
    const uint32_t before = kParts * tiles_before_ticket<C>(grid, p, tile(), step);
    if constexpr (C::kDqByTma) {
      if (leads()) ptx::wait_count(count(step), before);
      __syncwarp();
    } else {
      ptx::wait_at_least(count(step), before);
    }
  }
  // Called one step after the ticket's last, so that its additions have had time to complete.
  __device__ __forceinline__ void pass_ticket() {
    if (!ticket) return;
    if constexpr (!C::kDqByTma) {
      ptx::raise_by_warp(ticket);
    } else if (leads()) {
      ptx::bulk_wait<0>();
      ptx::raise_count(ticket);
    }
    ticket = nullptr;
  }

  // Issues dQ (+)= dS K for the keys of one CTA and kDqColumns columns.
  template <bool kFirst>
  __device__ __forceinline__ void start_dq(typename C::DQ& dq, uint32_t ds, uint32_t k) {
    const ColumnsDescriptor<DsTile> a(ptx::here(ds));
    const ColumnsDescriptor<KHalf> b(ptx::here(k));
    using Product = ptx::Wgmma<T, C::kDqColumns>;
    ptx::wgmma_fence();
    Product::template multiply<kFirst, 1, 1>(dq.x[0], a.at(0), b.at(0));
#pragma unroll
    for (int step = 1; step < kConsumerRows / 16; ++step)
      Product::template multiply<false, 1, 1>(dq.x[0], a.at(step), b.at(step));
    ptx::wgmma_commit();
  }

  // Issues dQ = dS K for all keys of the tile and the kDqColumns columns from `column` on. This CTA's keys
  // come first, because the other CTA's dS arrives later.
  __device__ __forceinline__ void start_all(typename C::DQ& dq, uint32_t use, int column) {
    const uint32_t ds = ptx::shared_address(shared.ds[use % C::kDsStages]);
    const int panel = KHalf::panel_offset(column / 8);
    if constexpr (C::kKeyParts == 1) {
      start_dq<true>(dq, ds, ptx::shared_address(shared.k) + panel);
    } else {
      const uint32_t other = (1 - this->rank()) * kConsumerRows * DsTile::kPitch;
      start_dq<true>(dq, ds + kConsumerRows * DsTile::kPitch - other,
                     ptx::shared_address(shared.k[this->rank()]) + panel);
      if (column == 0) shared.parts.ds.wait_full(use);
      start_dq<false>(dq, ds + other, ptx::shared_address(shared.k_other) + panel);
    }
  }

  __device__ __forceinline__ void run_step(const QueryStep& step) {
    const uint32_t use = step.number;
    if constexpr (C::kKeyParts > 1) {
      if (leads()) ptx::barrier_expect(shared.parts.ds.full_barrier(use), DsTile::kBytes / C::kCluster);
    }
    shared.ds_pipe.wait_full(use);
#pragma unroll
    for (int column = 0; column < kOwnColumns; column += C::kDqColumns) {
      typename C::DQ dq;
      start_all(dq, use, column);
      if (column == 0 && grid.tickets && begins_ticket(step)) wait_ticket(step);  // during the product
      ptx::wgmma_wait<0>();
      ptx::hold(dq.x[0]);
      if (column + C::kDqColumns == kOwnColumns) {
        shared.p_pipe.release_in_all(use, C::kKeyParts);
        pass_ticket();  // only now, because the other warpgroups wait for P, not for sums
      }
      if constexpr (C::kDqByTma) {
        send(dq, step, column);
      } else {
        add(dq, step, column);
      }
    }
    if (grid.tickets && ends_ticket(step)) ticket = count(step);
  }

  // The dQ accumulator of a step's query tile.
  __device__ __forceinline__ float* sums_of(const QueryStep& step) const {
    return sum_tile<C::kM>(p, tile().sums, step.head * grid.sums.tiles + step.tile);
  }

  // sums += dQ
  __device__ __forceinline__ void add(const typename C::DQ& dq, const QueryStep& step, int column) const {
    const Placement at{static_cast<int>(this->warp_row()), 16, this->rank() * kOwnColumns + column, 16};
    if (tile().starts_sums(step.tile))
      return add_to_sums<C::kM, false, true>(sums_of(step), p.head_dim, dq, at);
    add_to_sums<C::kM>(sums_of(step), p.head_dim, dq, at);
  }

  // Adds dQ to the accumulator by TMA. One thread issues the copy.
  __device__ __forceinline__ void send(const typename C::DQ& dq, const QueryStep& step, int column) const {
    if (leads()) ptx::bulk_wait_read<0>();
    __syncwarp();
    ptx::sync_group(2, kWarpgroup);
    store_part(dq, shared.dq, this->warp_row());
    ptx::fence_async_shared();
    ptx::sync_group(2, kWarpgroup);
    if (leads())
      start_sum_of_part<C::kM, C::kDqColumns>(sums_of(step), p.head_dim, shared.dq,
                                              {0, 16, this->rank() * kOwnColumns + column, 16},
                                              tile().starts_sums(step.tile));
  }

  __device__ __forceinline__ void run() {
    for (;; ++tile_index) {
      shared.state_pipe.wait_full(tile_index);
      if (uniform(tile().done)) break;
      shared.k_pipe.wait_full(tile_index);
      const auto run_own = [&](const QueryStep& step) {
        if constexpr (kListsSteps<C>) {
          shared.ds_pipe.wait_full(step.number);  // implies that step_ring holds this step
          run_step(shared.step_ring.get(step));
        } else {
          run_step(step);
        }
      };
      this->for_steps(run_own, run_own, [this](uint32_t) { pass_ticket(); });
      shared.k_pipe.release(tile_index);
      shared.state_pipe.release(tile_index);
    }
    if (C::kDqByTma && leads()) ptx::bulk_wait<0>();
  }
};

}  // namespace jax_flash
