// A consumer warpgroup of cuda/backward/hopper_pair.cuh: 64 of the 256 keys of a cluster's key tile.
#pragma once

#include <cstdint>

#include "cuda/backward/hopper_consumer.cuh"
#include "cuda/ptx/cluster.cuh"

namespace jax_flash {

template <class C>
struct PairConsumer : GradientConsumer<C> {
  using Base = GradientConsumer<C>;
  using Base::consumer, Base::dk, Base::dp, Base::dq, Base::dst, Base::dv, Base::grid, Base::p, Base::pt, Base::s,
      Base::shared, Base::step_use, Base::next_ready, Base::tile, Base::tile_index, Base::kTurn;
  using typename Base::DoTile, typename Base::DsTile, typename Base::KTile, typename Base::QTile,
      typename Base::T, typename Base::VTile;

  const int32_t rank = uniform(static_cast<int32_t>(ptx::cluster_rank()));

  __device__ __forceinline__ PairConsumer(const Problem& problem, typename C::Shared& memory,
                                          const KeyGrid& key_grid, int index)
      : Base(problem, memory, key_grid, index) {}

  // The warp's first key within the sequence.
  __device__ __forceinline__ int32_t key() const { return Base::key() + rank * C::kOwnKeys; }

  __device__ __forceinline__ bool is_partial(const QueryStep& step) const {
    return !uniform(tile().whole[rank * C::kConsumers + consumer]).contains(step.tile);
  }
  // Whether this CTA computes dQ of a step.
  __device__ __forceinline__ bool owns(uint32_t use) const { return use % 2 == static_cast<uint32_t>(rank); }

  // This lane's first chunk of a step's dS: the queries 8n + 2q and 8n + 2q + 1 of one key, for its q = lane %
  // 4, lie side by side, so that a lane stores them in two chunks. This permutes the rows of dQ
  // (query_sums.cuh).
  __device__ __forceinline__ uint32_t ds_address(uint32_t use) const {
    const uint32_t lane = ptx::lane_index(), row = Base::warp_row() + lane / 4;
    const uint32_t first = ptx::here(ptx::shared_address(shared.ds[use / 2 % C::kDsStages])) +
                           (rank * C::kOwnKeys + consumer * kConsumerRows) * DsTile::kPitch;
    return first + row * DsTile::kPitch + ((lane % 4 * 2 ^ lane / 4) << 4);
  }
  // store(offset, flip, x): for the 8 queries of each of this lane's 4 chunks.
  template <class Store>
  __device__ __forceinline__ void for_chunks(Store store) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int chunk = 0; chunk < 2; ++chunk) {
        const auto& a = dst.x[0][2 * chunk];
        const auto& b = dst.x[0][2 * chunk + 1];
        store(half * DsTile::kGroup, chunk, uint4{a[half], a[half + 2], b[half], b[half + 2]});
      }
    }
  }

  // Stores dSᵀ of a step whose dQ this CTA computes.
  __device__ __forceinline__ void keep_ds(uint32_t use) const {
    const uint32_t to = ds_address(use);
    for_chunks([&](int offset, int chunk, uint4 x) { ptx::store_shared((to ^ chunk << 4) + offset, x); });
    ptx::fence_async_shared();
    shared.ds_pipe.arrive_by_warp(use / 2);
    if (consumer == 0 && Base::warp_row() == 0 && ptx::arrives_for_warp())
      ptx::barrier_expect(shared.ds_pipe.full_barrier(use / 2), DsTile::kBytes / 2);
  }

  // Sends dSᵀ of a step to the CTA that computes its dQ.
  __device__ __forceinline__ void send_ds(uint32_t use) const {
    const uint32_t to = ds_address(use), other = 1 - rank,
                   full = ptx::address_in(shared.ds_pipe.full_barrier(use / 2), other);
    const uint32_t first[2] = {ptx::address_in(to, other), ptx::address_in(to ^ 16, other)};
    for_chunks([&](int offset, int chunk, uint4 x) {
      ptx::store_at(first[chunk] + offset,
                    make_float4(__uint_as_float(x.x), __uint_as_float(x.y), __uint_as_float(x.z),
                                __uint_as_float(x.w)),
                    full);
    });
  }

  // Issues dQ = dS K of all 256 keys, in half of the columns.
  __device__ __forceinline__ void start_dq(uint32_t use, bool known = false) {
    shared.ds_pipe.wait_full(use / 2, known);
    ptx::fence_async_shared();  // dS of the other CTA came by st.async
    const ColumnsDescriptor<DsTile> a(ptx::here(ptx::shared_address(shared.ds[use / 2 % C::kDsStages])));
    const ColumnsDescriptor<KTile> b(ptx::here(ptx::shared_address(shared.k)) +
                                     KTile::panel_offset(consumer * C::kDqColumns / 8));
    using Product = ptx::Wgmma<T, C::kDqColumns>;
    ptx::wgmma_fence();
    Product::template multiply<true, 1, 1>(dq.x[0], a.at(0), b.at(0));
#pragma unroll
    for (int step = 1; step < C::kN / 16; ++step)
      Product::template multiply<false, 1, 1>(dq.x[0], a.at(step), b.at(step));
    ptx::wgmma_commit();
  }
  __device__ __forceinline__ void finish_dq(uint32_t use, int32_t sum) {
    ptx::hold(dq.x[0]);
    if constexpr (!C::kSharesLoads) ptx::barrier_arrive_in_by_warp(shared.ds_pipe.empty_barrier(use / 2), 1 - rank);
    if constexpr (C::kDqByTma) {
      shared.ds_pipe.release(use / 2);
      ptx::barrier_arrive_in_by_warp(shared.sent_pipe.empty_barrier(use / 2), 1 - rank);
      send_dq(sum);
    } else if (!C::kDropDq) {
      Base::add_dq(sum);
    }
  }

  template <bool kOwn>
  __device__ __forceinline__ void share(uint32_t use) const {
    if constexpr (C::kDqByTma) (kOwn ? shared.ds_pipe : shared.sent_pipe).wait_empty(use / 2);
    if constexpr (kOwn) {
      keep_ds(use);
    } else {
      send_ds(use);
    }
  }

  __device__ __forceinline__ static bool leads() { return ptx::thread_index() % kWarpgroup == 0; }
  // Adds dQ by TMA. The leader has waited until the buffer is empty.
  __device__ __forceinline__ void send_dq(int32_t sum) {
    store_part(dq, shared.dq[consumer], Base::warp_row());
    ptx::fence_async_shared();
    ptx::sync_group(4 + consumer, kWarpgroup);
    if (leads() && !C::kDropDq)
      start_sum_of_part<C::kM, C::kDqColumns>(sum_tile<C::kM>(p, tile().sums, sum), p.head_dim, shared.dq[consumer],
                                              dq_placement<C>(consumer));
    __syncwarp();
  }

  // kOwn: this CTA computes the step's dQ. If not, it computes that of the step before, unless there is none.
  template <bool kOwn, bool kFirst>
  __device__ __forceinline__ void run_step(const QueryStep& step, int32_t sum_before) {
    constexpr bool kAddsDq = !kOwn && !kFirst;
    const uint32_t use = step.number, stage = use % C::kStages;
    shared.ready_pipe.wait_full(use, next_ready);
    start_from_delta(dp, shared.statistics[stage].delta);
    ptx::hold(dp.x[0]);
    Base::template start_scores<KTile, QTile>(s, shared.k + rank * C::kOwnKeys * KTile::kPitch,
                                              shared.q[stage]);               // Sᵀ = K Qᵀ  [64, M]
    Base::template start_scores<VTile, DoTile, true>(dp, shared.v, shared.d_out[stage]);  // dPᵀ = V dOᵀ
    ptx::wgmma_wait<1>();
    ptx::hold(s.x[0]);
    if (is_partial(step)) hide_unseen_keys<C>(s, p, tile(), step, key(), SeenByStep<C>{});
    Base::exponentiate(stage);  // Pᵀ = exp(Sᵀ − lse)
    ptx::wgmma_wait<0>();
    ptx::hold(dp.x[0]);
    Base::differentiate(stage);  // dSᵀ = Pᵀ ∘ (dPᵀ − delta)
    shared.ready_pipe.release(use);
    Base::round(pt, s);
    Base::round(dst, dp);
    ptx::hold(pt.x[0]);
    ptx::hold(dst.x[0]);
    ptx::hold(dv.x[0]);
    ptx::hold(dk.x[0]);
    if constexpr (!C::kSharesLoads && !kOwn) shared.ds_pipe.wait_empty(use / 2);
    bool known = false;
    if constexpr (C::kDqByTma && kAddsDq) {
      if (leads()) ptx::bulk_wait_read<0>();
      __syncwarp();
    }
    if constexpr (C::kPeeksDs && kAddsDq) known = shared.ds_pipe.is_full((use - 1) / 2);
    if constexpr (kAddsDq && C::kDqEarly) start_dq(use - 1, known);
    if constexpr (C::kShareEarly) share<kOwn>(use);
    if constexpr (C::kPins) {
      ptx::sync_group_after(kTurn + consumer, C::kConsumers * kWarpgroup, Base::all_of(dst));
    } else {
      ptx::sync_group(kTurn + consumer, C::kConsumers * kWarpgroup);
    }
    if constexpr (kAddsDq && C::kDqPlace == 0 && !C::kDqEarly) start_dq(use - 1, known);  // dQ = dS K of the step before
    ptx::wgmma_fence();
    Base::template start_sum<DoTile>(dv, pt, shared.d_out[stage]);  // dV += Pᵀ dO
    if constexpr (!C::kShareEarly && !C::kDqByTma) share<kOwn>(use);
    if constexpr (kAddsDq && C::kDqPlace == 1) start_dq(use - 1);
    Base::template start_sum<QTile>(dk, dst, shared.q[stage]);  // dK += dSᵀ Q
    if constexpr (kAddsDq && C::kDqPlace == 2) start_dq(use - 1);
    Base::pass_turn(1 - consumer);
    if constexpr (C::kDqByTma) share<kOwn>(use);
    if constexpr (kAddsDq && C::kDqPlace == 0 && !C::kAddsLast) {
      ptx::wgmma_wait<2>();
      finish_dq(use - 1, sum_before);
    }
    if constexpr (C::kPeeksReady) next_ready = shared.ready_pipe.is_full(use + 1);
    ptx::wgmma_wait<kAddsDq && C::kDqPlace ? 2 : 1>();
    ptx::hold(dv.x[0]);
    ptx::hold(pt.x[0]);
    release_queries(shared.do_pipe, use);
    if constexpr (kAddsDq && C::kDqPlace == 1) {
      ptx::wgmma_wait<1>();
      finish_dq(use - 1, sum_before);
    }
    ptx::wgmma_wait<kAddsDq && C::kDqPlace == 2 ? 1 : 0>();
    ptx::hold(dk.x[0]);
    ptx::hold(dst.x[0]);
    release_queries(shared.q_pipe, use);
    if constexpr (kAddsDq && (C::kDqPlace == 2 || C::kAddsLast)) {
      ptx::wgmma_wait<0>();
      finish_dq(use - 1, sum_before);
    }
  }

  template <class Pipe>
  __device__ __forceinline__ static void release_queries(const Pipe& pipe, uint32_t use) {
    if constexpr (C::kSharesLoads) {
      release(pipe, use);
    } else {
      pipe.release(use);
    }
  }
  // Releases a stage in both CTAs.
  template <class Pipe>
  __device__ __forceinline__ static void release(const Pipe& pipe, uint32_t use) {
    __syncwarp();
    const uint32_t lane = ptx::lane_index();
    if (lane < C::kCluster) ptx::barrier_arrive_in(pipe.empty_barrier(use), lane);
  }

  // K ← 0 and V ← 0 in rows that are not in use.
  __device__ __forceinline__ void clear_keys(int32_t count) const {
    constexpr int kThreads = C::kConsumers * kWarpgroup;
    const int thread = ptx::thread_index() - kWarpgroup;
    const int32_t own = count - rank * C::kOwnKeys;
    clear_rows<KTile>(shared.k, [count](int row) { return row < count; }, thread, kThreads);
    clear_rows<VTile>(shared.v, [own](int row) { return row < own; }, thread, kThreads);
    ptx::fence_async_shared();
    __syncwarp();
    ptx::sync_group(1, kThreads);
  }

  // All steps of the key tile.
  __device__ __forceinline__ void differentiate_tile() {
    const auto walk = steps_of(tile().walk);
    if (walk.tiles.empty()) return;
    const int32_t clean_keys = uniform(tile().clean_keys);
    if (clean_keys < C::kN) clear_keys(clean_keys);
    QueryStep step = QueryStep::first(walk, step_use);
    const int32_t end = step.number + walk.steps();
    int32_t sum_before = 0;
    const auto next = [&] {
      sum_before = step.head * grid.sums.tiles + step.tile;
      step.advance(walk);
      return step.number < end;
    };
    bool more = true;
    if (!owns(step_use)) {
      run_step<false, true>(step, 0);
      more = next();
    }
#pragma unroll 1
    while (more) {
      run_step<true, false>(step, 0);
      if (!next()) break;
      run_step<false, false>(step, sum_before);
      more = next();
    }
    step_use = ptx::here(step.number);
    if (owns(step_use - 1)) {
      start_dq(step_use - 1);
      if constexpr (C::kDqByTma) {
        if (leads()) ptx::bulk_wait_read<0>();
        __syncwarp();
        ptx::sync_group(4 + consumer, kWarpgroup);
      }
      ptx::wgmma_wait<0>();
      finish_dq(step_use - 1, sum_before);
    }
  }

  __device__ __forceinline__ void run() {
    if (consumer == 1) Base::pass_turn(0);
    for (;; ++tile_index) {
      shared.state_pipe.wait_full(tile_index);
      if (uniform(tile().done)) {
        if (C::kDqByTma && leads()) ptx::bulk_wait<0>();
        return;
      }
      dk.clear();
      dv.clear();
      shared.key_pipe.wait_full(tile_index);
      differentiate_tile();
      release(shared.key_pipe, tile_index);
      store_rows_from_registers(dv, tile().dvalue, key(), tile().work.tile.end);
      for_each(dk, [&](float& x, int, int, int) { x *= p.spec.scale; });  // dK ← scale · dK
      store_rows_from_registers(dk, tile().dkey, key(), tile().work.tile.end);
      shared.state_pipe.release(tile_index);
    }
  }
};

}  // namespace jax_flash
