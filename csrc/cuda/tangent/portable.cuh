// The portable tangent pass (forward-mode differentiation), which runs on sm_75 and every newer card. One pass
// over the keys of a query tile, with P recomputed from lse as in the backward:
//   dS = scale · (tQ Kᵀ + Q tKᵀ), through softcap, + tbias;   P = exp(S − lse);   r = rowsum(P ∘ dS)
//   tO = drop(P) tV + drop(P ∘ dS) V − r · O;                 tlse = r
// where dS and r are taken relative to a value near them in each row (TangentRows).
#pragma once

#include "core/families/portable_layout.h"
#include "core/plan/launch_plan.h"
#include "cuda/epilogue.cuh"
#include "cuda/launch.h"
#include "cuda/mask.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/registry.h"
#include "cuda/score/general.cuh"
#include "cuda/tangent/portable_state.cuh"
#include "cuda/tile/fragments.cuh"

namespace jax_flash::inline JF_ARCH_NAMESPACE {

// A row of csrc/kernels.def. Each warp owns 16 or 32 query rows; the general kernel has registers for 16.
template <class T, int HeadDim, int ValueDim, int M, int N, int Stages, int Warps, int Blocks, bool General>
struct TangentSm80 {
  using Element = T;
  static constexpr bool kGeneral = General;
  static constexpr int kM = M, kN = N, kWarps = General ? M / 16 : Warps, kWarpRows = M / kWarps;
  static constexpr int kThreads = kWarps * 32, kBlocks = General ? 1 : Blocks;
  static constexpr int kHeadSteps = HeadDim / kStepK<T>, kKeySteps = kN / kStepK<T>;
  using QTile = SharedTile<T, M, HeadDim>;
  using KTile = SharedTile<T, kN, HeadDim>;
  using VTile = SharedTile<T, kN, ValueDim>;
  using OTile = SharedTile<T, M, ValueDim>;
  using S = Accumulator<kWarpRows / 16, kN / 8>;
  using O = Accumulator<kWarpRows / 16, ValueDim / 8>;
  using Ring = TangentRing<Stages, kThreads, KTile, VTile>;
  // Where a warp owns 16 rows, 32 registers hold the leading fragments of Q and tQ.
  static constexpr bool kQInRegisters = !General && sizeof(T) == 2 && kWarpRows == 16;
  static constexpr int kQSteps = !kQInRegisters ? 0 : kHeadSteps < 4 ? kHeadSteps : 4;
  using Q = LeadingFragmentsA<T, kWarpRows / 16, kHeadSteps, kQSteps, QTile>;
  static constexpr TangentLayout kLayout =
      tangent_layout({HeadDim, ValueDim, M, N, Stages, Warps, false}, sizeof(T));
  static constexpr int kSharedBytes = kLayout.bytes;
  static_assert(kLayout.tq == QTile::kBytes && kLayout.ring == 2 * QTile::kBytes &&
                kLayout.bytes - kLayout.ring == Ring::kBytes);
  static_assert(sizeof(TangentState<T>) <= kBlockStateBytes);
  static_assert(kWarpRows % 16 == 0 && kN % 16 == 0);
  // Each warp stores its rows of tO over its own rows of Q, so no barrier is needed.
  static_assert(ValueDim <= HeadDim && QTile::kPitch == OTile::kPitch);
};

// S += Q Kᵀ and dS += tQ Kᵀ [M, N]; with tK too, dS += Q tKᵀ. A fragment of K serves two products, and so does
// one of Q.
template <class C, bool kWithTk>
__device__ __forceinline__ void multiply_scores(typename C::S& s, typename C::S& ds, const typename C::Q& q,
                                                const typename C::Q& tq, uint32_t k_tile, uint32_t tk_tile) {
  using T = typename C::Element;
  using S = typename C::S;
  const RowsB<typename C::KTile> k(k_tile, 0), tk(tk_tile, 0);
#pragma unroll kUnrolled < T, C::kHeadSteps, typename C::Q>
  for (int step = 0; step < C::kHeadSteps; ++step) {
    uint32_t qf[S::kRowTiles][4], tqf[S::kRowTiles][4];
#pragma unroll
    for (int m = 0; m < S::kRowTiles; ++m) q.load(qf[m], m, step), tq.load(tqf[m], m, step);
#pragma unroll
    for (int n = 0; n < S::kColumnTiles; n += 2) {
      const auto multiply = [&](S& c, const uint32_t(&a)[S::kRowTiles][4], const uint32_t(&b)[4]) {
#pragma unroll
        for (int m = 0; m < S::kRowTiles; ++m) {
          ptx::mma<T>(c.x[m][n], a[m], b[0], b[1]);
          ptx::mma<T>(c.x[m][n + 1], a[m], b[2], b[3]);
        }
      };
      uint32_t kf[4];
      k.load(kf, n, step);
      multiply(s, qf, kf);
      multiply(ds, tqf, kf);
      if constexpr (kWithTk) {
        tk.load(kf, n, step);
        multiply(ds, qf, kf);
      }
    }
  }
}

// dS ← softcap'(S) ∘ scale · dS + tbias, and S to powers of two with every option applied. S = −inf where a key
// is hidden.
template <class S>
__device__ __forceinline__ void apply_general(const Problem& p, const Tangents& t, const ScoreOperands& score,
                                              const void* tbias, const Band& band, int32_t row, int32_t key,
                                              S& s, S& ds) {
  for_each(ds, [&](float& x, int, int, int) { x *= p.spec.scale; });
  GeneralScore(p, score, band).apply(s, row, key, &ds);
  if (!tbias) return;
  const auto add = [&]<class B>() {
    for_each_used<B>(ds, tbias, t.tbias, band, row, key, [](float& x, B y) { x += static_cast<float>(y); });
  };
  if (p.bias_dtype == DType::kF32) {
    add.template operator()<float32>();
  } else if (p.bias_dtype == DType::kF16) {
    add.template operator()<float16>();
  } else {
    add.template operator()<bfloat16>();
  }
}

// O += drop(P) tV + drop(T) V [M, dv] with P = 2^S and T = P ∘ (dS − c), and r += rowsum(P ∘ dS). With stages,
// the exponentials of later keys overlap the products of earlier ones.
template <class C>
__device__ __forceinline__ void add_values(const Problem& p, const TangentState<typename C::Element>& block,
                                           typename C::O& o, typename C::S& s, typename C::S& ds,
                                           TangentRows<typename C::S>& rows, typename C::Ring& ring, int32_t n,
                                           int32_t row) {
  using T = typename C::Element;
  using S = typename C::S;
  using V = ColumnsB<typename C::VTile, 16, true>;
  constexpr int kTiles = kStepK<T> / 8;  // column tiles of S per k step
  const float scale = C::kGeneral ? 1.0f : p.spec.scale;
  const auto exponentiate = [&](int begin, int end) {
#pragma unroll
    for (int slot = 0; slot < S::kSlots; ++slot) {
#pragma unroll
      for (int i = begin; i < end; ++i) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float &x = s.at(slot, i, e), &y = ds.at(slot, i, e);
          x = ptx::exp2(x);
          const float scaled = x * scale;
          y *= scaled;
          rows.r[slot] += fmaf(scaled, rows.c[slot], y);
        }
      }
    }
  };
  if constexpr (C::kGeneral || !C::Ring::kTogether) {
    exponentiate(0, S::kColumnTiles);
    if (C::kGeneral && p.dropout) {
      const auto kept = block.score.dropout_at(row, n * C::kN).template elements<S>();
      kept.drop(s, 0, S::kColumnTiles), kept.drop(ds, 0, S::kColumnTiles);
    }
    multiply_add<T, C::kKeySteps>(o, RegistersA<T, S>{ds}, V(ring.wait_v(n), 0));
    multiply_add<T, C::kKeySteps>(o, RegistersA<T, S>{s}, V(ring.wait_tv(n), 0));
  } else {
    const V v(ring.wait_v(n), 0), tv(ring.wait_tv(n), 0);
#pragma unroll
    for (int k_step = 0; k_step < C::kKeySteps; ++k_step) {
      exponentiate(k_step * kTiles, (k_step + 1) * kTiles);
      multiply_add_step<T>(o, RegistersA<T, S>{s}, tv, k_step);
      multiply_add_step<T>(o, RegistersA<T, S>{ds}, v, k_step);
    }
  }
}

// tlse = r, and tO = factor · tO − (r − c) · O; both 0 in rows that see no key.
template <class C>
__device__ __forceinline__ void finish_rows(const Problem& p, const TangentState<typename C::Element>& block,
                                            const TangentRows<typename C::S>& rows, int32_t row,
                                            typename C::O& o) {
  using O = typename C::O;
  const float factor = C::kGeneral ? dropout_scale(p.spec) : 1.0f, unit = C::kGeneral ? 1.0f : p.spec.scale;
#pragma unroll
  for (int slot = 0; slot < O::kSlots; ++slot) {
    const int32_t i = row + O::row(slot);
    const bool empty = rows.sees_nothing(slot);
    const float sum = row_sum(rows.r[slot]), r = empty ? 0 : sum;
    ptx::store_global(block.tlse + i * block.tlse_stride, r, i < block.work.tile.end && threadIdx.x % 4 == 0);
    const float left = fmaf(-unit, rows.c[slot], r);
    const auto* out = block.out.data + int64_t{i} * block.out.stride + O::column(0);
#pragma unroll
    for (int n = 0; n < O::kColumnTiles; ++n) {
      float2 x{0, 0};
      if (!empty && O::column_step(n) < block.out.columns) x = ptx::load_pair(out + O::column_step(n));
      o.at(slot, n, 0) = empty ? 0 : fmaf(-left, x.x, factor * o.at(slot, n, 0));
      o.at(slot, n, 1) = empty ? 0 : fmaf(-left, x.y, factor * o.at(slot, n, 1));
    }
  }
}

template <class C>
__device__ __forceinline__ void tangent_tile(const Problem& p, const Tangents& t,
                                             const TangentState<typename C::Element>& block,
                                             uint8_t* shared) {
  using S = typename C::S;
  const TileWork& tile = block.work.tile;
  const int warp_row = static_cast<int>(threadIdx.x) / 32 * C::kWarpRows;
  const uint32_t q_tile = ptx::shared_address(shared) + C::kLayout.q, tq_tile = q_tile + C::kLayout.tq;
  typename C::Ring ring(q_tile + C::kLayout.ring, block);
  typename C::Q q(q_tile, warp_row), tq(tq_tile, warp_row);
  // The warp's first query row, reloaded from shared memory at each use to save a register.
  auto row = [&] { return static_cast<const volatile int32_t&>(tile.row) + warp_row; };
  TangentRows<S> rows(p, block.lse, row(), tile.q_len);

  typename C::O o;
  o.clear();
  if (!block.tiles.empty()) {
    load_tile<typename C::QTile, C::kThreads>(q_tile, block.query, tile.row, tile.used_queries());
    load_tile<typename C::QTile, C::kThreads>(tq_tile, block.tquery, tile.row, tile.used_queries());
    ring.start();
  }
  for (int32_t n = block.tiles.lo; n < block.tiles.hi; ++n) {
    const int32_t key = n * C::kN;
    const uint32_t k = ring.wait_k(n);
    if constexpr (C::kQSteps > 0) {
      if (n == block.tiles.lo) q.read(q_tile, warp_row), tq.read(tq_tile, warp_row);
    }
    S s, ds;
    s.clear();
    for_each(ds, [&](float& x, int slot, int, int) { x = C::kGeneral ? 0 : -rows.c[slot]; });
    multiply_scores<C, C::Ring::kTogether>(s, ds, q, tq, k, k + C::KTile::kBytes);  // S = Q Kᵀ, dS = tQ Kᵀ + …
    if constexpr (!C::Ring::kTogether)
      multiply_add<typename C::Element, C::kHeadSteps>(ds, q, RowsB<typename C::KTile>(ring.wait_tk(n), 0));
    const bool partial = key < block.whole.lo || key + C::kN > block.whole.hi;
    if constexpr (C::kGeneral)
      apply_general(p, t, block.score, block.tbias, block.band, row(), key, s, ds);
    if (partial) mask(s, block.band, row(), key);
    if (C::kGeneral || partial)
      for_each(ds, [&](float& x, int slot, int i, int e) {  // a hidden key's dS may be NaN
        if (C::kGeneral && rows.sees_nothing(slot)) s.at(slot, i, e) = -INFINITY;
        if (s.at(slot, i, e) == -INFINITY) x = 0;
        if (C::kGeneral) x -= rows.c[slot];
      });
    subtract_lse(s, rows, C::kGeneral ? 1.0f : p.spec.scale * kLog2e);
    if (partial || n == block.tiles.lo) rows.center(s, ds, block.band, row(), key, n == block.tiles.lo);
    // P = 2^S, T = P ∘ (dS − c), r += rowsum(P ∘ dS); O += P tV + T V
    add_values<C>(p, block, o, s, ds, rows, ring, n, row());
  }
  ring.finish();
  finish_rows<C>(p, block, rows, row(), o);  // tlse = r; tO = O − r · out
  store_rows<typename C::OTile>(o, shared, warp_row, block.tout, row(), tile.end);
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocks)
    tangent_sm80(const __grid_constant__ Problem p, const __grid_constant__ Tangents t,
                 const TileWork* schedule, int32_t tiles) {
  __shared__ TangentState<typename C::Element> block;
  if (threadIdx.x == 0) {
    block.prepare(p, t, schedule, tiles, C::kM, C::kN);
    if constexpr (C::kGeneral) block.prepare_score(p, t);
  }
  __syncthreads();
  if (block.work.tile.row < block.work.tile.end) tangent_tile<C>(p, t, block, ptx::dynamic_shared());
}

template <class C>
cudaError_t launch_tangent_sm80(const Problem& p, const Tangents& t, const LaunchPlan& plan, void* workspace,
                                cudaStream_t stream) {
  const TileGrid& grid = plan.queries;
  return launch(tangent_sm80<C>, grid.blocks, C::kThreads, C::kSharedBytes, stream, p, t,
                schedule_of(grid, workspace), static_cast<int32_t>(grid.tiles));
}

// The general kernel has dropout, too.
template <class T, RowColumns R>
cudaError_t launch_row(const Problem& p, const Tangents& t, const LaunchPlan& plan, void* workspace,
                       cudaStream_t stream) {
  const auto run = [&]<bool kGeneral>() {
    return launch_tangent_sm80<TangentSm80<T, R.head_dim, R.value_dim, R.block_m, R.block_n, R.stages,
                                           R.warps, R.blocks, kGeneral>>(p, t, plan, workspace, stream);
  };
  return plan.general() ? run.template operator()<true>() : run.template operator()<false>();
}

}  // namespace jax_flash::inline JF_ARCH_NAMESPACE
