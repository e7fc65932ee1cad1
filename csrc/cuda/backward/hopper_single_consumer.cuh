// The consumer of cuda/backward/hopper.cuh in CTAs of 64 keys, which have only this one. Its steps come from
// a list of its own. During its exponentials another CTA on the same SM keeps the tensor cores busy, so dQ
// need not wait for the next step.
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

  // Stores dSᵀ in shared memory, and waits until all warps have stored theirs. A warp overwrites the tile two
  // steps later. Before that it waits here once more, for warps that have finished dQ of this tile.
  __device__ __forceinline__ void store_ds(uint32_t use) {
    static_assert(C::kDsStages == 2);
    const LaneAddress<DsTile> to(ptx::shared_address(shared.ds[use % C::kDsStages]),
                                 Base::warp_row() + Base::lane() % 16, Base::lane() / 16);
#pragma unroll
    for (int k = 0; k < C::kM / 16; ++k) ptx::stmatrix_x4(to.at(0, 2 * k), dst.x[0][k]);
    ptx::fence_async_shared();
    ptx::sync_group(2, kWarpgroup);
  }

  // Issues dQ = dS K  [M, d]
  __device__ __forceinline__ void start_dq(uint32_t use) {
    const ColumnsDescriptor<DsTile> a(ptx::here(ptx::shared_address(shared.ds[use % C::kDsStages])));
    const ColumnsDescriptor<KTile> b(ptx::here(ptx::shared_address(shared.keys(0))));
    using Product = ptx::Wgmma<T, C::kDqColumns>;
    ptx::hold(dq.x[0]);
    ptx::wgmma_fence();
    Product::template multiply<true, 1, 1>(dq.x[0], a.at(0), b.at(0));
#pragma unroll
    for (int step = 1; step < C::kN / 16; ++step)
      Product::template multiply<false, 1, 1>(dq.x[0], a.at(step), b.at(step));
    ptx::wgmma_commit();
  }

  // Pᵀ and dSᵀ, rounded.
  __device__ __forceinline__ void differentiate_scores(const QueryStep& step) {
    const uint32_t stage = static_cast<uint32_t>(step.number) % C::kStages;
    static_assert(C::kStartsFromDelta);
    start_from_delta(dp, shared.statistics[stage].delta);
    ptx::hold(dp.x[0]);
    const auto q = this->template rows<QTile>(shared.q[stage]);
    const auto d_out = this->template rows<DoTile>(shared.d_out[stage]);
    start_scores<T>(s, this->keys(), q);               // Sᵀ = K Qᵀ  [64, M]
    start_scores<T, true>(dp, this->values(), d_out);  // dPᵀ = V dOᵀ
    ptx::wgmma_wait<1>();
    ptx::hold(s.x[0]);
    if (this->is_partial(step)) hide_unseen_keys<C>(s, p, tile(), step, this->key(), SeenByStep<C>{});
    this->exponentiate(s, stage);  // Pᵀ = exp(Sᵀ − lse)
    ptx::wgmma_wait<0>();
    ptx::hold(dp.x[0]);
    this->differentiate(s, dp, stage);  // dSᵀ = Pᵀ ∘ (dPᵀ − delta)
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
    start_dq(use);
    this->template start_sum<QTile>(dk, dst, shared.q[stage]);  // dK += dSᵀ Q
    ptx::wgmma_wait<2>();
    ptx::hold(dv.x[0]);
    ptx::hold(pt.x[0]);
    shared.do_pipe.release(use);
    ptx::wgmma_wait<1>();
    ptx::hold(dq.x[0]);
    add_dq(*this, step.head * this->grid.sums.tiles + step.tile);
    ptx::wgmma_wait<0>();
    ptx::hold(dk.x[0]);
    ptx::hold(dst.x[0]);
    shared.q_pipe.release(use);
  }

  __device__ __forceinline__ void run() {
    this->run_tiles([this] {
      const int32_t steps = uniform(tile().walk.count);
      if (steps == 0) return;
      const int32_t clean_keys = uniform(tile().clean_keys);
      if (clean_keys < C::kN) clear_keys<C>(shared, 0, clean_keys);
      const uint32_t end = step_use + steps;
#pragma unroll 1
      for (; step_use != end; ++step_use) run_step(step_use);
    });
  }
};

}  // namespace jax_flash
