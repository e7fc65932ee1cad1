// The consumer warpgroup of cuda/backward/hopper_cluster.cuh that computes dS and adds up dK.
#pragma once

#include <cstdint>

#include "cuda/backward/hopper_cluster_consumer.cuh"
#include "cuda/ptx/ldmatrix.cuh"

namespace jax_flash {

// Computes dPᵀ = V dOᵀ, dSᵀ and dK += dSᵀ Q.
template <class C>
struct ScoreGradientConsumer : ClusterConsumer<C> {
  using Base = ClusterConsumer<C>;
  using Base::Base, Base::p, Base::shared, Base::tile, Base::tile_index;
  using typename Base::DoHalf, typename Base::DsTile, typename Base::QHalf, typename Base::S,
      typename Base::T, typename Base::VHalf;

  S dp;                      // dPᵀ, then dSᵀ  [64, M]
  typename C::Fragments ds;  // dSᵀ, rounded
  typename C::DKHalf dk[2];  // dK [64, d]

  __device__ __forceinline__ void start_dp(uint32_t use) {
    shared.delta_pipe.wait_full(use);
    shared.do_pipe.wait_full(this->do_use(use, 0));
    shared.do_pipe.wait_full(this->do_use(use, 1));
    ptx::wgmma_fence();
    this->template start_product<true, VHalf, DoHalf>(dp, shared.v[0], this->d_out(use, 0));
    this->template start_product<false, VHalf, DoHalf>(dp, shared.v[1], this->d_out(use, 1));
    ptx::wgmma_commit();
  }

  // Waits for dPᵀ over all columns.
  __device__ __forceinline__ void finish_dp(uint32_t use) {
    ptx::wgmma_wait<0>();
    ptx::hold(dp.x[0]);
    shared.do_pipe.release_in_all(this->do_use(use, 0), C::kKeyParts);
    shared.do_pipe.release_in_all(this->do_use(use, 1), C::kKeyParts);
    if constexpr (C::kSplitsColumns) shared.parts.dp.add(dp, 0, use);
  }

  // dK += dSᵀ Q
  __device__ __forceinline__ void add_dk(uint32_t use) {
    const auto& q = shared.q[use % C::kStages];
    ptx::hold(dk[0].x[0]);
    ptx::hold(dk[1].x[0]);
    ptx::wgmma_fence();
    this->template start_sum<QHalf>(dk[0], ds, q[0]);
    this->template start_sum<QHalf>(dk[1], ds, q[1]);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::hold(dk[0].x[0]);
    ptx::hold(dk[1].x[0]);
    ptx::hold(ds.x[0]);
    shared.q_pipe.release_in_all(use, C::kKeyParts);
  }

  // dSᵀ = Pᵀ ∘ (dPᵀ − delta), or dSᵀ = |W| (drop(dPᵀ) − delta). CTAs with different keys send it to each
  // other.
  __device__ __forceinline__ void differentiate(uint32_t use) {
    const uint32_t stage = use % C::kStages;
    const auto at = this->ds_address(use);
    shared.p_pipe.wait_full(use);
    const auto* delta =
        reinterpret_cast<const float2*>(shared.statistics[stage].delta) + ptx::lane_index() % 4;
    const float factor = C::Score::kDropout ? dropout_scale(p.spec) : 1;
    const auto gradient = [factor](float w, float dp, float delta) {
      return score_gradient<typename C::Score>(w, dp, delta, factor);
    };
#pragma unroll
    for (int k = 0; k < C::kM / 16; ++k) {
      uint32_t w[4];
      ptx::ldmatrix_x4(w, at.at(0, 2 * k));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int slot = 2 * (2 * k + i);
        const float2 d = delta[2 * slot];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float2 x = ptx::unpack<T>(w[2 * i + e]);
          dp.at(slot, 0, e) = gradient(x.x, dp.at(slot, 0, e), d.x);
          dp.at(slot + 1, 0, e) = gradient(x.y, dp.at(slot + 1, 0, e), d.y);
        }
      }
    }
    shared.delta_pipe.release(use);
    this->round(ds, dp);
    __syncwarp();
#pragma unroll
    for (int k = 0; k < C::kM / 16; ++k) ptx::stmatrix_x4(at.at(0, 2 * k), ds.x[0][k]);
    ptx::fence_async_shared();
    ptx::barrier_arrive_by_warp(shared.ds_pipe.full_barrier(use));
    if constexpr (C::kSplitsColumns) shared.parts.dp.release(0, use);
    if constexpr (C::kKeyParts > 1) {
      if (ptx::lane_index() == 0)
        ptx::copy_bytes_in(ptx::shared_address(shared.ds[use % C::kDsStages]) +
                               (this->rank() * kConsumerRows + this->warp_row()) * C::DsTile::kPitch,
                           16 * C::DsTile::kPitch, shared.parts.ds.full_barrier(use), 1 - this->rank());
    }
    ptx::hold(ds.x[0]);
  }

  __device__ __forceinline__ void run_tile() {
    this->for_steps(
        [&](const QueryStep& step) {
          shared.v_pipe.wait_full(tile_index);
          start_dp(step.number);
          finish_dp(step.number);
          differentiate(step.number);
        },
        [&](const QueryStep& step) {
          add_dk(step.number - 1);
          start_dp(step.number);
          finish_dp(step.number);
          differentiate(step.number);
        },
        [&](uint32_t use) {
          shared.v_pipe.release(tile_index);
          add_dk(use);
        });
  }

  __device__ __forceinline__ void run() {
    for (;; ++tile_index) {
      shared.state_pipe.wait_full(tile_index);
      if (uniform(tile().done)) return;
      dk[0].clear(), dk[1].clear();
      run_tile();
      if (uniform(tile().walk.tiles).empty()) {
        shared.v_pipe.wait_full(tile_index);
        shared.v_pipe.release(tile_index);
      }
      const bool in_floats = this->grid.head_parts > 1;
      auto to = tile().dkey;
      to.skip_columns(first_own_column<C, QHalf>(), in_floats ? 2 : 1);
#pragma unroll
      for (auto& half : dk) {
        for_each(half, [&](float& x, int, int, int) { x *= p.spec.scale; });  // dK ← scale · dK
        clear_rows_from(tile().work.tile.used_keys() - this->key(), half);
        store_gradient_rows(half, to, this->key(), tile().work.tile.end, in_floats);
        to.skip_columns(QHalf::kColumns, in_floats ? 2 : 1);
      }
      shared.state_pipe.release(tile_index);
    }
  }
};

}  // namespace jax_flash
