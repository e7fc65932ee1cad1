// A consumer warpgroup of cuda/backward/hopper.cuh: 64 keys of a key tile. Scores are transposed, with a row
// for each key, so that Pᵀ and dSᵀ are the left operands of dV and dK where they lie: in registers.
#pragma once

#include <cstdint>

#include "cuda/backward/hopper_state.cuh"
#include "cuda/backward/query_step.cuh"
#include "cuda/epilogue.cuh"
#include "cuda/gradient.cuh"
#include "cuda/mask.cuh"
#include "cuda/ptx/stmatrix.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/tile/descriptor.cuh"
#include "cuda/tile/operands.cuh"

namespace jax_flash {

// Sᵀ ← −inf outside the band, for keys from `key` and queries from `row` on.
template <class S>
__device__ __forceinline__ void mask_transposed(S& s, const Band& band, int32_t key, int32_t row) {
  const auto queries = [&](int slot) {
    const int32_t j = key + S::row(slot);
    return band.queries(j, j + 1);
  };
  hide(s, row, -INFINITY, [&](int slot) { return queries(slot).lo; }, BeforeLimit{});
  hide(s, row, -INFINITY, [&](int slot) { return queries(slot).hi; }, FromLimit{});
}

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

// What a consumer has in registers.
template <class C>
struct GradientConsumer {
  using T = typename C::Element;
  using S = typename C::S;
  using KTile = typename C::KTile;
  using VTile = typename C::VTile;
  using QTile = typename C::QTile;
  using DoTile = typename C::DoTile;
  using DsTile = typename C::DsTile;

  const Problem& p;
  typename C::Shared& shared;
  const int consumer;
  uint32_t tile_index = 0, step_use = 0;  // key tiles and steps so far
  S s, dp;                                // Sᵀ, then Pᵀ, and dPᵀ, then dSᵀ  [64, M]
  typename C::Fragments pt, dst;          // Pᵀ and dSᵀ, rounded
  typename C::DK dk;                      // dK [64, d]
  typename C::DV dv;                      // dV [64, dv]
  typename C::DQ dq;                      // dQ: 64 rows of all keys' sum, or half of the columns

  __device__ __forceinline__ GradientConsumer(const Problem& problem, typename C::Shared& memory, int index)
      : p(problem), shared(memory), consumer(index) {}

  // Unsigned, as the remainder of a signed number takes more instructions.
  __device__ __forceinline__ static uint32_t lane() {
    return static_cast<uint32_t>(ptx::thread_index()) % 32;
  }
  __device__ __forceinline__ static uint32_t warp_row() {
    return static_cast<uint32_t>(ptx::thread_index()) % kWarpgroup / 32 * 16;
  }
  // The key tile.
  __device__ __forceinline__ const typename C::Shared::Tile& tile() const {
    return shared.tiles[tile_index % kKeyTileStates];
  }
  // The warp's first key within the sequence.
  __device__ __forceinline__ int32_t key() const {
    return uniform(tile().work.tile.row) + consumer * kConsumerRows + warp_row();
  }

  // Issues Sᵀ = K Qᵀ or dPᵀ = V dOᵀ  [64, M]
  template <class RowTile, class ColumnTile>
  __device__ __forceinline__ void start_scores(S& to, const uint8_t* rows, const uint8_t* columns) {
    const RowsDescriptor<RowTile> a(
        ptx::here(ptx::shared_address(rows) + consumer * kConsumerRows * RowTile::kPitch));
    const RowsDescriptor<ColumnTile> b(ptx::here(ptx::shared_address(columns)));
    using Product = ptx::Wgmma<T, C::kM>;
    ptx::wgmma_fence();
    Product::template multiply<true>(to.x[0], a.at(0), b.at(0));
#pragma unroll
    for (int step = 1; step < RowTile::kChunks / 2; ++step)
      Product::template multiply<false>(to.x[0], a.at(step), b.at(step));
    ptx::wgmma_commit();
  }

  // Issues dV += Pᵀ dO or dK += dSᵀ Q
  template <class Tile, class Sum>
  __device__ __forceinline__ void start_sum(Sum& sum, const typename C::Fragments& a, const uint8_t* tile) {
    const ColumnsDescriptor<Tile> b(ptx::here(ptx::shared_address(tile)));
#pragma unroll
    for (int step = 0; step < C::kM / 16; ++step)
      ptx::Wgmma<T, Tile::kColumns>::template multiply<false, 1>(sum.x[0], a.x[0][step], b.at(step));
    ptx::wgmma_commit();
  }

  // Issues dQ = dS K, with the dS of both consumers.
  __device__ __forceinline__ void start_dq(uint32_t use) {
    shared.ds_pipe[0].wait_full(use);
    shared.ds_pipe[1].wait_full(use);
    const uint32_t ds = ptx::here(ptx::shared_address(shared.ds[use % C::kDsStages])),
                   k = ptx::here(ptx::shared_address(shared.k));
    const ColumnsDescriptor<DsTile> a(C::kDqByRows ? ds + DsTile::panel_offset(8 * consumer) : ds);
    const ColumnsDescriptor<KTile> b(C::kDqByRows ? k
                                                  : k + KTile::panel_offset(consumer * C::kDqColumns / 8));
    using Product = ptx::Wgmma<T, C::kDqColumns>;
    ptx::wgmma_fence();
    Product::template multiply<true, 1, 1>(dq.x[0], a.at(0), b.at(0));
#pragma unroll
    for (int step = 1; step < C::kN / 16; ++step)
      Product::template multiply<false, 1, 1>(dq.x[0], a.at(step), b.at(step));
    ptx::wgmma_commit();
  }

  // Hands dQ to the thread that adds it up.
  __device__ __forceinline__ void send_dq(uint32_t use) {
    const auto& pipe = shared.dq_pipe[consumer];
    pipe.wait_empty(use);
    store_blocks<typename C::DqBlock>(dq, ptx::shared_address(shared.dq[consumer]), warp_row(), lane());
    ptx::fence_async_shared();
    ptx::barrier_arrive_by_warp(pipe.full_barrier(use));
  }

  // Pᵀ = 2^(scale · Sᵀ − lse); gradient.cuh says what is done where lse is coarse.
  __device__ __forceinline__ void exponentiate(uint32_t stage) {
    const auto* lse = reinterpret_cast<const float2*>(shared.statistics[stage].lse) + ptx::lane_index() % 4;
    const float scale = p.spec.scale * kLog2e;
#pragma unroll
    for (int n = 0; n < S::kColumnTiles; ++n) {
      const float2 l = lse[4 * n];
#pragma unroll
      for (int slot = 0; slot < S::kSlots; ++slot) {
        s.at(slot, n, 0) = fmaf(s.at(slot, n, 0), scale, -l.x);
        s.at(slot, n, 1) = fmaf(s.at(slot, n, 1), scale, -l.y);
      }
    }
    if (__builtin_expect(uniform(shared.coarse[stage]), false)) {
      for_each(s, [&](float& x, int, int n, int e) {
        settle_coarse(x, shared.statistics[stage].lse[S::column(n) + e]);
      });
    }
    for_each(s, [&](float& x, int, int, int) { x = ptx::exp2(x); });
  }

  // dSᵀ = Pᵀ ∘ (dPᵀ − delta)
  __device__ __forceinline__ void differentiate(uint32_t stage) {
    const auto* delta =
        reinterpret_cast<const float2*>(shared.statistics[stage].delta) + ptx::lane_index() % 4;
#pragma unroll
    for (int n = 0; n < S::kColumnTiles; ++n) {
      const float2 d = delta[4 * n];
#pragma unroll
      for (int slot = 0; slot < S::kSlots; ++slot) {
        dp.at(slot, n, 0) = s.at(slot, n, 0) * (dp.at(slot, n, 0) - d.x);
        dp.at(slot, n, 1) = s.at(slot, n, 1) * (dp.at(slot, n, 1) - d.y);
      }
    }
  }

  __device__ __forceinline__ void round(typename C::Fragments& to, const S& from) {
    const RegistersA<T, S> rounded{from};
#pragma unroll
    for (int k = 0; k < C::kM / 16; ++k) rounded.load(to.x[0][k], 0, k);
  }

  // dSᵀ to shared memory, for both consumers' dQ.
  __device__ __forceinline__ void share_ds(uint32_t use) {
    const auto& pipe = shared.ds_pipe[consumer];
    pipe.wait_empty(use);
    const LaneAddress<DsTile> to(ptx::shared_address(shared.ds[use % C::kDsStages]),
                                 consumer * kConsumerRows + warp_row() + lane() % 16, lane() / 16);
#pragma unroll
    for (int k = 0; k < C::kM / 16; ++k) ptx::stmatrix_x4(to.at(0, 2 * k), dst.x[0][k]);
    ptx::fence_async_shared();
    ptx::barrier_arrive_by_warp(pipe.full_barrier(use));
  }

  // A step. dQ is the one of the step before, so that no consumer waits for the other's dS of this one.
  template <bool kFirst>
  __device__ __forceinline__ void run_step(const QueryStep& step) {
    const uint32_t use = step.number, stage = use % C::kStages;
    const int32_t row = step.tile * C::kM;
    shared.ready_pipe.wait_full(use);
    shared.q_pipe.wait_full(use);
    start_scores<KTile, QTile>(s, shared.k, shared.q[stage]);  // Sᵀ = K Qᵀ  [64, M]
    shared.do_pipe.wait_full(use);
    start_scores<VTile, DoTile>(dp, shared.v, shared.d_out[stage]);  // dPᵀ = V dOᵀ  [64, M]
    ptx::wgmma_wait<1>();
    ptx::hold(s.x[0]);
    if (!uniform(tile().whole[consumer]).contains(step.tile)) mask_transposed(s, tile().band, key(), row);
    exponentiate(stage);  // Pᵀ = exp(Sᵀ − lse)
    ptx::wgmma_wait<0>();
    ptx::hold(dp.x[0]);
    differentiate(stage);  // dSᵀ = Pᵀ ∘ (dPᵀ − delta)
    shared.ready_pipe.release(use);
    round(pt, s);
    round(dst, dp);
    share_ds(use);
    ptx::hold(pt.x[0]);
    ptx::hold(dst.x[0]);
    ptx::hold(dv.x[0]);
    ptx::hold(dk.x[0]);
    if constexpr (!kFirst) start_dq(use - 1);  // dQ = dS K of the step before
    ptx::wgmma_fence();
    start_sum<DoTile>(dv, pt, shared.d_out[stage]);  // dV += Pᵀ dO
    start_sum<QTile>(dk, dst, shared.q[stage]);      // dK += dSᵀ Q
    if constexpr (!kFirst) {
      ptx::wgmma_wait<2>();
      ptx::hold(dq.x[0]);
      shared.ds_pipe[1 - consumer].release(use - 1);
      send_dq(use - 1);
    }
    ptx::wgmma_wait<1>();
    ptx::hold(dv.x[0]);
    ptx::hold(pt.x[0]);
    shared.do_pipe.release(use);
    ptx::wgmma_wait<0>();
    ptx::hold(dk.x[0]);
    ptx::hold(dst.x[0]);
    shared.q_pipe.release(use);
  }

  // K ← 0 and V ← 0 in rows that are not in use.
  __device__ __forceinline__ void clear_keys(int32_t count) {
    constexpr int kThreads = C::kConsumers * kWarpgroup;
    const int thread = ptx::thread_index() - kWarpgroup;
    clear_rows<KTile>(shared.k, {0, count}, thread, kThreads);
    clear_rows<VTile>(shared.v, {0, count}, thread, kThreads);
    ptx::fence_async_shared();
    ptx::sync_group(1, kThreads);
  }

  // All steps of the key tile.
  __device__ __forceinline__ void differentiate_tile() {
    const QueryWalk walk = uniform(tile().walk);
    if (walk.tiles.empty()) return;
    const int32_t clean_keys = uniform(tile().clean_keys);
    if (clean_keys < C::kN) clear_keys(clean_keys);
    QueryStep step = QueryStep::first(walk, step_use);
    const int32_t end = step.number + walk.steps();
    run_step<true>(step);
    step.advance(walk);
#pragma unroll 1
    for (; step.number < end; step.advance(walk)) run_step<false>(step);
    step_use = ptx::here(step.number);
    start_dq(step_use - 1);
    ptx::wgmma_wait<0>();
    ptx::hold(dq.x[0]);
    shared.ds_pipe[1 - consumer].release(step_use - 1);
    send_dq(step_use - 1);
  }

  __device__ __forceinline__ void run() {
    for (;; ++tile_index) {
      shared.state_pipe.wait_full(tile_index);
      if (uniform(tile().done)) return;
      dk.clear();
      dv.clear();
      shared.key_pipe.wait_full(tile_index);
      differentiate_tile();
      shared.key_pipe.release(tile_index);
      store_rows_from_registers(dv, tile().dvalue, key(), tile().work.tile.end);
      for_each(dk, [&](float& x, int, int, int) { x *= p.spec.scale; });  // dK ← scale · dK
      store_rows_from_registers(dk, tile().dkey, key(), tile().work.tile.end);
      shared.state_pipe.release(tile_index);
    }
  }
};

}  // namespace jax_flash
