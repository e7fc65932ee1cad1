// The consumer of cuda/backward/hopper.cuh where it is the only one of its CTA, with 64 keys. Its steps come
// from a list of its own. Another CTA on the same SM, instead of another consumer, keeps the tensor cores
// busy during exponentials, so that dQ is computed in the step that it belongs to.
#pragma once

#include <cstdint>

#include "cuda/backward/hopper_consumer.cuh"

namespace jax_flash {

template <class C>
struct SingleConsumer : GradientConsumer<C> {
  using Base = GradientConsumer<C>;
  using Base::Base, Base::p, Base::shared, Base::s, Base::dp, Base::pt, Base::dst, Base::dk, Base::dv,
      Base::dq, Base::step_use, Base::tile;
  using typename Base::DoTile, typename Base::DsTile, typename Base::KTile, typename Base::QTile,
      typename Base::T, typename Base::VTile;

  static constexpr int kDqParts = C::HeadDim / C::kDqColumns, kBarrier = 2;

  // Stores dSᵀ in shared memory, and waits until all warps have. With one tile of dS, all warps must have
  // read that of the step before.
  __device__ __forceinline__ void store_ds(uint32_t use) {
    if constexpr (C::kDsStages == 1) ptx::sync_group(kBarrier, kWarpgroup);
    const LaneAddress<DsTile> to(ptx::shared_address(shared.ds[use % C::kDsStages]),
                                 Base::warp_row() + Base::lane() % 16, Base::lane() / 16);
#pragma unroll
    for (int k = 0; k < C::kM / 16; ++k) ptx::stmatrix_x4(to.at(0, 2 * k), dst.x[0][k]);
    ptx::fence_async_shared();
    ptx::sync_group(kBarrier, kWarpgroup);
  }

  // Issues some columns of dQ = dS K  [M, kDqColumns]
  __device__ __forceinline__ void start_dq_part(uint32_t use, int part) {
    const ColumnsDescriptor<DsTile> a(ptx::here(ptx::shared_address(shared.ds[use % C::kDsStages])));
    const ColumnsDescriptor<KTile> b(
        ptx::here(ptx::shared_address(shared.k) + KTile::panel_offset(part * C::kDqColumns / 8)));
    using Product = ptx::Wgmma<T, C::kDqColumns>;
    ptx::hold(dq.x[0]);
    ptx::wgmma_fence();
    Product::template multiply<true, 1, 1>(dq.x[0], a.at(0), b.at(0));
#pragma unroll
    for (int step = 1; step < C::kN / 16; ++step)
      Product::template multiply<false, 1, 1>(dq.x[0], a.at(step), b.at(step));
    ptx::wgmma_commit();
  }

  // Adds these columns to the sums.
  __device__ __forceinline__ void add_dq_part(const QueryStep& step, int part) {
    ptx::hold(dq.x[0]);
    const Placement at{static_cast<int32_t>(Base::warp_row()), 16, part * C::kDqColumns, 16};
    float* const sums = sum_tile<C::kM>(p, tile().sums, step.head * this->grid.sums.tiles + step.tile);
    add_to_sums<C::kM>(sums, p.head_dim, dq, at);
  }

  // Pᵀ and dSᵀ, rounded.
  __device__ __forceinline__ void differentiate_scores(const QueryStep& step) {
    const uint32_t stage = static_cast<uint32_t>(step.number) % C::kStages;
    if constexpr (C::kStartsFromDelta) {
      start_from_delta(dp, shared.statistics[stage].delta);
      ptx::hold(dp.x[0]);
    }
    this->template start_scores<KTile, QTile>(s, shared.k, shared.q[stage]);  // Sᵀ = K Qᵀ  [64, M]
    this->template start_scores<VTile, DoTile, C::kStartsFromDelta>(dp, shared.v,
                                                                    shared.d_out[stage]);  // dPᵀ = V dOᵀ
    ptx::wgmma_wait<1>();
    ptx::hold(s.x[0]);
    if (this->is_partial(step)) hide_unseen_keys<C>(s, p, tile(), step, this->key(), SeenByStep<C>{});
    this->exponentiate(stage);  // Pᵀ = exp(Sᵀ − lse)
    ptx::wgmma_wait<0>();
    ptx::hold(dp.x[0]);
    this->differentiate(stage);  // dSᵀ = Pᵀ ∘ (dPᵀ − delta)
    shared.ready_pipe.release(step.number);
    this->round(pt, s);
    this->round(dst, dp);
    ptx::hold(pt.x[0]);
    ptx::hold(dst.x[0]);
  }

  __device__ __forceinline__ void run_step(uint32_t use) {
    const uint32_t stage = use % C::kStages;
    shared.ready_pipe.wait_full(use);
    const QueryStep step = shared.step_ring.get({0, 0, static_cast<int32_t>(use)});
    differentiate_scores(step);
    ptx::hold(dv.x[0]);
    ptx::hold(dk.x[0]);
    ptx::wgmma_fence();
    this->template start_sum<DoTile>(dv, pt, shared.d_out[stage]);  // dV += Pᵀ dO
    store_ds(use);                                                  // overlaps with the product
    start_dq_part(use, 0);
    this->template start_sum<QTile>(dk, dst, shared.q[stage]);  // dK += dSᵀ Q
    ptx::wgmma_wait<2>();
    ptx::hold(dv.x[0]);
    ptx::hold(pt.x[0]);
    shared.do_pipe.release(use);
    ptx::wgmma_wait<1>();
    add_dq_part(step, 0);
    if constexpr (kDqParts > 1) start_dq_part(use, 1);
    ptx::wgmma_wait<kDqParts - 1>();
    ptx::hold(dk.x[0]);
    ptx::hold(dst.x[0]);
    shared.q_pipe.release(use);
    if constexpr (kDqParts > 1) {
      ptx::wgmma_wait<0>();
      add_dq_part(step, 1);
    }
  }

  __device__ __forceinline__ void run() {
    static_assert(kDqParts <= 2);
    this->run_tiles([this] {
      const int32_t steps = uniform(tile().walk.count);
      if (steps == 0) return;
      const int32_t clean_keys = uniform(tile().clean_keys);
      if (clean_keys < C::kN) this->clear_keys(clean_keys);
      const uint32_t end = step_use + steps;
#pragma unroll 1
      for (; step_use != end; ++step_use) run_step(step_use);
    });
  }
};

}  // namespace jax_flash
