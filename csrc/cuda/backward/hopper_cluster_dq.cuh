// The consumer warpgroup of cuda/backward/hopper_cluster.cuh that adds up dQ.
#pragma once

#include <cstdint>

#include "cuda/backward/hopper_cluster_consumer.cuh"
#include "cuda/ptx/atomic.cuh"
#include "cuda/ptx/reduce.cuh"
#include "cuda/ptx/tma.cuh"

namespace jax_flash {

inline constexpr int32_t kTicketSteps = 2;  // of a ticket below, at most, as a power of two

// Stores a warp's rows of dQ, from `row` on, as blocks of 16 columns in the order of ptx::add_quad.
template <class Block, class DQ>
__device__ __forceinline__ void store_blocks(const DQ& dq, uint32_t blocks, uint32_t row, uint32_t lane) {
  const uint32_t to = blocks + Block::offset(row + lane / 4, static_cast<int>(lane % 4));
#pragma unroll
  for (int n = 0; n < DQ::kColumnTiles; n += 2)
#pragma unroll
    for (int slot = 0; slot < DQ::kSlots; ++slot)
      ptx::store_shared(
          to + n / 2 * Block::kBytes + 8 * slot * Block::kPitch,
          make_float4(dq.at(slot, n, 0), dq.at(slot, n, 1), dq.at(slot, n + 1, 0), dq.at(slot, n + 1, 1)));
}

// dQ = dS K, half of the columns, of both CTAs' keys.
template <class C>
struct QueryGradientConsumer : ClusterConsumer<C> {
  using Base = ClusterConsumer<C>;
  using Base::p, Base::shared, Base::tile, Base::tile_index;
  using typename Base::DsTile, typename Base::KHalf, typename Base::T;

  const typename C::Maps& maps;
  const KeyGrid& grid;
  float* rows;  // of the first head's dQ in the accumulator

  __device__ __forceinline__ QueryGradientConsumer(const Problem& problem, const typename C::Maps& all,
                                                   typename C::Shared& memory, const KeyGrid& key_grid)
      : Base(problem, memory), maps(all), grid(key_grid) {}

  __device__ __forceinline__ static bool leads() { return ptx::thread_index() % kWarpgroup == 0; }

  // In a deterministic call key tiles add to dQ in their order, a few query tiles or heads for one ticket,
  // since a ticket takes a wait for memory and a fence. The count of the first of them says how many parts
  // have been added: each CTA of a cluster has one by TMA, else one of each warp.
  static constexpr int32_t kTicketHeads = 1 << kTicketSteps;
  static constexpr uint32_t kParts = C::kCluster * (C::kDqByTma ? 1 : kConsumerWarps);
  uint32_t* ticket = nullptr;  // the count of the ticket that is done with, but not passed on

  __device__ __forceinline__ int32_t ticket_of(const QueryStep& step) const {
    return step.tile >> maps.ticket_shift;
  }
  // Whether a step is the first, the last of its ticket: the walk goes backwards, with the heads at each
  // tile.
  __device__ __forceinline__ bool begins_ticket(const QueryStep& step) const {
    const bool first = ticket_of(step) != (step.tile + 1) >> maps.ticket_shift;
    return step.head % kTicketHeads == 0 && (first || step.tile == uniform(tile().walk.tiles.hi) - 1);
  }
  __device__ __forceinline__ bool ends_ticket(const QueryStep& step) const {
    const bool last = ticket_of(step) != (step.tile - 1) >> maps.ticket_shift;
    const bool last_head = (step.head + 1) % kTicketHeads == 0 || step.head == uniform(tile().walk.heads) - 1;
    return last_head && (last || step.tile == uniform(tile().walk.tiles.lo));
  }
  __device__ __forceinline__ uint32_t* count_of(const QueryStep& step) const {
    const int32_t head = step.head / kTicketHeads * kTicketHeads;
    return tile().tickets + head * grid.query_tiles + (ticket_of(step) << maps.ticket_shift);
  }
  __device__ __forceinline__ void wait_ticket(const QueryStep& step) const {
    if (C::kDqByTma && this->warp_row() > 0) return;
    const uint32_t before =
        kParts * tiles_before<C>(grid, p, tile(), ticket_of(step), C::kM << maps.ticket_shift);
    if constexpr (C::kDqByTma) {
      if (leads()) ptx::wait_count(count_of(step), before);
      __syncwarp();
    } else {
      ptx::wait_at_least(count_of(step), before);
    }
  }
  // A step later, when the additions are done, so that no warp waits for them.
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

  // Issues dQ (+)= dS K for the keys of one CTA, some of the columns.
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

  __device__ __forceinline__ void run_step(const QueryStep& step) {
    const uint32_t use = step.number;
    if (grid.tickets && begins_ticket(step)) wait_ticket(step);
    if (leads()) ptx::barrier_expect(shared.ds_other_pipe.full_barrier(use), DsTile::kBytes / C::kCluster);
    shared.ds_pipe.wait_full(use);
#pragma unroll
    for (int column = 0; column < KHalf::kColumns; column += C::kDqColumns) {
      typename C::DQ dq;
      const uint32_t ds = ptx::shared_address(shared.ds[use % C::kDsStages]),
                     other = (1 - this->rank()) * kConsumerRows * DsTile::kPitch;
      const int panel = KHalf::panel_offset(column / 8);
      start_dq<true>(dq, ds + kConsumerRows * DsTile::kPitch - other,
                     ptx::shared_address(shared.k[this->rank()]) + panel);
      if (column == 0) shared.ds_other_pipe.wait_full(use);
      start_dq<false>(dq, ds + other, ptx::shared_address(shared.k_other) + panel);
      if (column == 0) pass_ticket();
      ptx::wgmma_wait<0>();
      ptx::hold(dq.x[0]);
      if (column + C::kDqColumns == KHalf::kColumns) shared.p_pipe.release_in_all(use, C::kCluster);
      if constexpr (C::kDqByTma) {
        send(dq, step, column);
      } else {
        add(dq, step, column);
      }
    }
    if (grid.tickets && ends_ticket(step)) ticket = count_of(step);
  }

  // The first row of dQ in the accumulator.
  __device__ __forceinline__ float* find_rows() const {
    const BlockWork& work = tile().work;
    const int64_t batch = p.packed() ? 1 : p.batch;
    const int64_t row = (work.leading * batch + work.batch_row) * p.q_rows + work.tile.q_begin;
    return maps.accumulator + (row * p.heads + work.head) * accumulator_columns(p.head_dim);
  }

  // accumulator += dQ
  __device__ __forceinline__ void add(const typename C::DQ& dq, const QueryStep& step, int column) const {
    const int32_t columns = accumulator_columns(p.head_dim), stride = p.heads * columns;
    const int32_t lane = ptx::lane_index(), row = step.tile * C::kM + this->warp_row() + lane / 4;
    const int32_t end = uniform(tile().seen).hi;
    column += this->rank() * KHalf::kColumns;
    float* to = rows + int64_t{row} * stride + (step.head * columns + column);
#pragma unroll
    for (int slot = 0; slot < C::DQ::kSlots; ++slot) {
#pragma unroll
      for (int n = 0; n < C::DQ::kColumnTiles; n += 2)
        if (row + 8 * slot < end && column + 8 * n < columns)
          ptx::add_quad(to + 8 * n, lane % 4, dq.at(slot, n, 0), dq.at(slot, n, 1), dq.at(slot, n + 1, 0),
                        dq.at(slot, n + 1, 1));
      to += 8 * stride;
    }
  }

  // Has TMA do that. One thread issues it.
  __device__ __forceinline__ void send(const typename C::DQ& dq, const QueryStep& step, int column) const {
    using Block = typename C::DqBlock;
    const uint32_t lane = ptx::lane_index();
    if (leads()) ptx::bulk_wait_read<0>();
    __syncwarp();
    ptx::sync_group(2, kWarpgroup);
    store_blocks<Block>(dq, ptx::shared_address(shared.dq), this->warp_row(), lane);
    ptx::fence_async_shared();
    ptx::sync_group(2, kWarpgroup);
    if (!leads()) return;
    const BlockWork& work = tile().work;
    ptx::Coordinates at{0, work.head + step.head, work.tile.q_begin + step.tile * C::kM, work.batch_row,
                        static_cast<int32_t>(work.leading)};
#pragma unroll
    for (int block = 0; block < C::kDqColumns / kAccumulatorBlock; ++block) {
      at.column = this->rank() * KHalf::kColumns + column + block * kAccumulatorBlock;
      ptx::reduce_add_box(maps.dquery, ptx::shared_address(shared.dq) + block * Block::kBytes, at);
    }
    ptx::bulk_commit();
  }

  __device__ __forceinline__ void run() {
    for (;; ++tile_index) {
      shared.state_pipe.wait_full(tile_index);
      if (uniform(tile().done)) break;
      rows = find_rows();
      shared.k_pipe.wait_full(tile_index);
      const auto run_own = [&](const QueryStep& step) {
        if constexpr (kListsSteps<C>) {
          shared.ds_pipe.wait_full(step.number);  // the other warpgroups have passed the step on by then
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
