// The consumer of cuda/backward/hopper.cuh where it is the only one of its CTA, with 64 keys: for lists of
// steps of its own, and for short calls, which have more of these key tiles for the SMs. Another CTA on the
// same SM, instead of another consumer, keeps the tensor cores busy during exponentials, so that dQ is
// computed in the step that it belongs to.
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

  // Stores dSᵀ in shared memory, and waits until all warps have. A warp that stores the next tile but one has
  // waited once more, and thus for all warps' dQ of this one.
  __device__ __forceinline__ void store_ds(uint32_t use) {
    static_assert(C::kDsStages == 2);
    const LaneAddress<DsTile> to(ptx::shared_address(shared.ds[use % C::kDsStages]),
                                 Base::warp_row() + Base::lane() % 16, Base::lane() / 16);
#pragma unroll
    for (int k = 0; k < C::kM / 16; ++k) ptx::stmatrix_x4(to.at(0, 2 * k), dst.x[0][k]);
    ptx::fence_async_shared();
    ptx::sync_group(2, kWarpgroup);
  }

  // Issues kDqColumns columns of dQ = dS K  [M, d]
  __device__ __forceinline__ void start_dq(uint32_t use, int part) {
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

  // Adds the part to the sums of the step's query tile.
  __device__ __forceinline__ void add_dq(const QueryStep& step, int part) {
    ptx::hold(dq.x[0]);
    Placement at = dq_placement<C>(part);
    at.row += Base::warp_row();
    add_to_sums<C::kM>(sum_tile<C::kM>(p, tile().sums, step.head * this->grid.sums.tiles + step.tile),
                       p.head_dim, dq, at);
  }

  // Pᵀ and dSᵀ, rounded.
  __device__ __forceinline__ void differentiate_scores(const QueryStep& step) {
    const uint32_t stage = static_cast<uint32_t>(step.number) % C::kStages;
    static_assert(C::kStartsFromDelta);
    start_from_delta(dp, shared.statistics[stage].delta);
    ptx::hold(dp.x[0]);
    this->template start_scores<KTile, QTile>(s, shared.k, shared.q[stage]);  // Sᵀ = K Qᵀ  [64, M]
    this->template start_scores<VTile, DoTile, true>(dp, shared.v, shared.d_out[stage]);  // dPᵀ = V dOᵀ
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

  __device__ __forceinline__ void run_step(QueryStep step) {
    const uint32_t use = step.number, stage = use % C::kStages;
    shared.ready_pipe.wait_full(use);
    step = shared.step_ring.get(step);
    differentiate_scores(step);
    ptx::hold(dv.x[0]);
    ptx::hold(dk.x[0]);
    ptx::wgmma_fence();
    this->template start_sum<DoTile>(dv, pt, shared.d_out[stage]);  // dV += Pᵀ dO
    store_ds(use);                                                  // overlaps with the product
    start_dq(use, 0);
    this->template start_sum<QTile>(dk, dst, shared.q[stage]);  // dK += dSᵀ Q
    ptx::wgmma_wait<2>();
    ptx::hold(dv.x[0]);
    ptx::hold(pt.x[0]);
    shared.do_pipe.release(use);
    ptx::wgmma_wait<1>();
    add_dq(step, 0);
    ptx::wgmma_wait<0>();
    ptx::hold(dk.x[0]);
    ptx::hold(dst.x[0]);
    shared.q_pipe.release(use);
#pragma unroll
    for (int part = 1; part < C::HeadDim / C::kDqColumns; ++part) {
      start_dq(use, part);
      ptx::wgmma_wait<0>();
      add_dq(step, part);
    }
  }

  // The walk is read again in each step, because there are few registers.
  __device__ __forceinline__ auto walk() const { return steps_of(tile().walk); }

  __device__ __forceinline__ void run() {
    this->run_tiles([this] {
      if (walk().tiles.empty()) return;
      const int32_t clean_keys = uniform(tile().clean_keys);
      if (clean_keys < C::kN) this->clear_keys(clean_keys);
      QueryStep step = QueryStep::first(walk(), step_use);
      const int32_t end = step.number + walk().steps();
#pragma unroll 1
      for (; step.number < end; step.advance(walk())) run_step(step);
      step_use = ptx::here(step.number);
    });
  }
};

}  // namespace jax_flash
