// The portable tangent pass (forward-mode differentiation), which runs on sm_75 and every newer card. One
// pass over the keys of a query tile, with P recomputed from lse as in the backward:
//   dS = scale · (tQ Kᵀ + Q tKᵀ), through softcap, + tbias;   P = exp(S − lse);   r = rowsum(P ∘ dS)
//   tO = drop(P) tV + drop(P ∘ dS) V − r · O;                 tlse = r
// where dS and r are taken relative to a value near them in each row (TangentRows).
#pragma once

#include "core/families/portable_layout.h"
#include "core/plan/launch_plan.h"
#include "cuda/epilogue.cuh"
#include "cuda/launch.h"
#include "cuda/mask.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/registry.h"
#include "cuda/score/portable_variants.cuh"
#include "cuda/slices.cuh"
#include "cuda/tangent/portable_state.cuh"
#include "cuda/tile/fragments.cuh"

namespace jax_flash::inline JF_ARCH_NAMESPACE {

// A row of csrc/kernels.def. Each warp owns 16 or 32 query rows; with score options it has registers for 16.
template <class T, Row R, ScoreKind Kind>
struct TangentSm80 {
  using Element = T;
  static constexpr bool kPlain = Kind == ScoreKind::kPlain;
  static constexpr bool kSliced = R.is_sliced();
  static constexpr int kSliceColumns = R.slice_columns(), kHeadDim = R.head_dim, kValueDim = kSliceColumns;
  static constexpr int kM = R.block_m, kN = R.block_n;
  static constexpr int kWarps = kPlain ? R.warps : kM / 16, kWarpRows = kM / kWarps;
  static constexpr int kThreads = kWarps * 32, kBlocks = kPlain ? R.blocks : 1;
  static constexpr int kHeadSteps = kHeadDim / kStepK<T>, kKeySteps = kN / kStepK<T>;
  using QTile = SharedTile<T, kM, kHeadDim>;
  using KTile = SharedTile<T, kN, kHeadDim>;
  using VTile = SharedTile<T, kN, kValueDim>;
  using OTile = SharedTile<T, kM, kValueDim>;
  using S = Accumulator<kWarpRows / 16, kN / 8>;
  using O = Accumulator<kWarpRows / 16, kValueDim / 8>;
  using Score = PortableScore<Kind, S>;
  static constexpr bool kSkips = Score::reads(Operand::kBlockMask);
  using Ring = TangentRing<R.stages, kThreads, KTile, VTile, kSkips>;
  // If a warp owns 16 rows, 32 registers hold the leading fragments of Q and tQ.
  static constexpr bool kQInRegisters = kPlain && sizeof(T) == 2 && kWarpRows == 16;
  static constexpr int kQSteps = !kQInRegisters ? 0 : kHeadSteps < 4 ? kHeadSteps : 4;
  using Q = LeadingFragmentsA<T, kWarpRows / 16, kHeadSteps, kQSteps, QTile>;
  static constexpr TangentLayout kLayout = tangent_layout(R, sizeof(T));
  static constexpr int kSharedBytes = kLayout.bytes;
  static_assert(kLayout.tq == QTile::kBytes && kLayout.ring == 2 * QTile::kBytes &&
                kLayout.bytes - kLayout.ring == Ring::kBytes);
  using State = TangentState<T, is_general(Kind)>;
  static_assert(sizeof(State) <= kBlockStateBytes);
  static_assert(kWarpRows % 16 == 0 && kN % 16 == 0);
  // Each warp stores its rows of tO over its own rows of Q, so no barrier is needed.
  static_assert(kValueDim <= kHeadDim && QTile::kPitch == OTile::kPitch);
};

// The tile of S of a warp, for its score variant.
template <class C>
struct TangentTile {
  using Element = typename C::Element;
  const Problem& p;
  const Tangents& t;
  const typename C::State& block;
  int32_t key;  // position of the first key in the sequence

  // The unit of dS. Variants with options compute dS in the unit of the scores.
  __device__ __forceinline__ float unit() const { return C::kPlain ? p.spec.scale : 1.0f; }
  __device__ __forceinline__ const ScoreOperands& operands() const { return block.score; }
  __device__ __forceinline__ const Band& band() const { return block.band; }
  // The warp's first query row, within the query tile and within the sequence. They are computed again at
  // each use, because the loop has no register to keep them in.
  __device__ __forceinline__ static int warp_row() { return ptx::thread_index() / 32 * C::kWarpRows; }
  __device__ __forceinline__ int32_t row() const {
    return static_cast<const volatile int32_t&>(block.work.tile.row) + warp_row();
  }
};

// S += Q Kᵀ and dS += tQ Kᵀ [M, N]; with tK also dS += Q tKᵀ. Each fragment of K is used for two products,
// and so is each fragment of Q.
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
      const auto multiply = [&](S& c, const uint32_t (&a)[S::kRowTiles][4], const uint32_t (&b)[4]) {
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

// The tile of S with its dS, to which the score variant adds the bias's tangent where it adds the bias to S.
template <class C>
struct BiasedTangentTile : TangentTile<C> {
  typename C::S& ds;

  // dS ← dS + tbias
  __device__ __forceinline__ void add_tangent() const {
    if (!this->block.tbias) return;
    const auto add = [&]<class B>() {
      for_each_used<B>(ds, this->block.tbias, this->t.tbias, this->band(), this->row(), this->key,
                       [](float& x, B y) { x += static_cast<float>(y); });
    };
    if (this->p.bias_dtype == DType::kF32) {
      add.template operator()<float32>();
    } else if (this->p.bias_dtype == DType::kF16) {
      add.template operator()<float16>();
    } else {
      add.template operator()<bfloat16>();
    }
  }
};

// Turns the products into the operands of add_values(): S, times log2(e), minus lse, and −∞ where a key is
// hidden; dS in at.unit(), and 0 where a key is hidden, whatever the key holds.
template <class C>
__device__ __forceinline__ void finish_scores(typename C::S& s, typename C::S& ds,
                                              TangentRows<typename C::S>& rows, const TangentTile<C>& at) {
  const auto& block = at.block;
  const bool partial = at.key < block.whole.lo || at.key + C::kN > block.whole.hi;
  const bool first = at.key == block.tiles.lo * C::kN;
  if constexpr (!C::kPlain) {
    for_each(ds, [&](float& x, int, int, int) { x *= at.p.spec.scale; });
    typename C::Score score;
    const BiasedTangentTile<C> tile{at, ds};
    score.template differentiate<GradientOf::kProduct>(s, ds, tile);  // S ← score(S); dS ← score'(S) ∘ dS
  }
  if (partial) mask(s, block.band, at.row(), at.key);
  if (!C::kPlain || partial) {
    for_each(ds, [&](float& x, int slot, int n, int e) {
      if (!C::kPlain && rows.sees_nothing(slot)) s.at(slot, n, e) = -INFINITY;
      if (s.at(slot, n, e) == -INFINITY) x = 0;
    });
  }
  subtract_lse(s, rows, C::Score::power_scale(at.p.spec));
  if (partial || first) rows.find_c(s, ds, block.band, at.row(), at.key, first);
}

// O += drop(P) tV + drop(T) V [M, dv] with P = 2^S and T = P ∘ (dS − c), and r += rowsum(P ∘ dS). With
// stages, the exponentials of later keys overlap the products of earlier ones.
template <class C>
__device__ __forceinline__ void add_values(typename C::O& o, typename C::S& s, typename C::S& ds,
                                           TangentRows<typename C::S>& rows, typename C::Ring& ring,
                                           int32_t n, const TangentTile<C>& at) {
  using T = typename C::Element;
  using S = typename C::S;
  using V = ColumnsB<typename C::VTile, 16, true>;
  const float unit = at.unit();
  const auto exponentiate = [&](int begin, int end) {
#pragma unroll
    for (int slot = 0; slot < S::kSlots; ++slot) {
#pragma unroll
      for (int i = begin; i < end; ++i) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float &x = s.at(slot, i, e), &y = ds.at(slot, i, e);
          x = ptx::exp2(x);
          const float scaled = x * unit;
          rows.r[slot] = fmaf(scaled, y, rows.r[slot]);
          y = scaled * (y - rows.c[slot]);
        }
      }
    }
  };
  if constexpr (!C::kPlain || !C::Ring::kTogether) {
    exponentiate(0, S::kColumnTiles);
    if (C::Score::kDropout && at.p.dropout) {
      const auto kept = at.operands().dropout_at(at.row(), at.key).template elements<S>();
      kept.drop(s, 0, S::kColumnTiles), kept.drop(ds, 0, S::kColumnTiles);
    }
    multiply_add<T, C::kKeySteps>(o, RegistersA<T, S>{ds}, V(ring.wait_v(n), 0));
    multiply_add<T, C::kKeySteps>(o, RegistersA<T, S>{s}, V(ring.wait_tv(n), 0));
  } else {
    constexpr int kSteps = kStepsAtOnce<T>, kTiles = kSteps * kStepK<T> / 8;  // of k; of S, along the keys
    const V v(ring.wait_v(n), 0), tv(ring.wait_tv(n), 0);
#pragma unroll
    for (int k_step = 0; k_step < C::kKeySteps; k_step += kSteps) {
      const int tile = k_step / kSteps * kTiles;
      exponentiate(tile, tile + kTiles);
      multiply_add_step<T>(o, RegistersA<T, S>{s}, tv, k_step);
      multiply_add_step<T>(o, RegistersA<T, S>{ds}, v, k_step);
    }
  }
}

// tlse = r, and tO = factor · tO − (r − c) · O; both 0 in rows that see no key.
template <class C>
__device__ __forceinline__ void finish_rows(typename C::O& o, const TangentRows<typename C::S>& rows,
                                            const TangentTile<C>& at) {
  using O = typename C::O;
  const auto& block = at.block;
  const float factor = C::Score::kDropout ? dropout_scale(at.p.spec) : 1.0f;
#pragma unroll
  for (int slot = 0; slot < O::kSlots; ++slot) {
    const int32_t i = at.row() + O::row(slot);
    const bool empty = rows.sees_nothing(slot);
    const float sum = row_sum(rows.r[slot]), r = empty ? 0 : sum, left = fmaf(-at.unit(), rows.c[slot], r);
    ptx::store_global(block.tlse + i * block.tlse_stride, r, i < block.work.tile.end && threadIdx.x % 4 == 0);
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
                                             const typename C::State& block, uint8_t* shared) {
  using S = typename C::S;
  using K = RowsB<typename C::KTile>;
  const TileWork& tile = block.work.tile;
  const uint32_t q_tile = ptx::shared_address(shared) + C::kLayout.q, tq_tile = q_tile + C::kLayout.tq;
  typename C::Ring ring(q_tile + C::kLayout.ring, block);
  TangentTile<C> at{p, t, block, 0};
  typename C::Q q(q_tile, at.warp_row()), tq(tq_tile, at.warp_row());
  TangentRows<S> rows(p, block.lse, at.row(), tile.q_len);

  typename C::O o;
  o.clear();
  const auto from = shown_from<C>(p, block);
  if (!block.tiles.empty()) {
    load_tile<typename C::QTile, C::kThreads>(q_tile, block.query, tile.row, tile.used_queries());
    load_tile<typename C::QTile, C::kThreads>(tq_tile, block.tquery, tile.row, tile.used_queries());
    ring.start(block.tiles.lo, from);
  }
  for (int32_t n = block.tiles.lo; n < block.tiles.hi; n = ring.next(n)) {
    at.key = n * C::kN;
    const uint32_t k = ring.wait_k(n, from);
    if constexpr (C::kQSteps > 0) {
      if (n == block.tiles.lo) q.read(q_tile, at.warp_row()), tq.read(tq_tile, at.warp_row());
    }
    S s, ds;
    s.clear(), ds.clear();
    multiply_scores<C, C::Ring::kTogether>(s, ds, q, tq, k,
                                           k + C::KTile::kBytes);  // S = Q Kᵀ, dS = tQ Kᵀ + …
    if constexpr (!C::Ring::kTogether)
      multiply_add<typename C::Element, C::kHeadSteps>(ds, q, K(ring.wait_tk(n), 0));  // … + Q tKᵀ
    finish_scores<C>(s, ds, rows, at);           // options, band, S ← S − lse
    add_values<C>(o, s, ds, rows, ring, n, at);  // O ← O + P tV + (P ∘ dS) V, r ← r + rowsum(P ∘ dS)
  }
  ring.finish();
  finish_rows<C>(o, rows, at);  // tlse = r; tO = O − r · out
  store_rows<typename C::OTile>(o, shared, at.warp_row(), block.tout, at.row(), tile.end);
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocks)
    tangent_sm80(const __grid_constant__ Problem p, const __grid_constant__ Tangents t,
                 const __grid_constant__ GridTiles grid) {
  __shared__ typename C::State block;
  if (threadIdx.x == 0) {
    block.prepare(p, t, grid, C::kM, C::kN, first_column<C>());
    if constexpr (!C::kPlain) block.template prepare_score<typename C::Score>(p, t);
  }
  __syncthreads();
  begin_at_shown<C>(p, block);
  if (block.work.tile.row < block.work.tile.end) tangent_tile<C>(p, t, block, ptx::dynamic_shared());
}

template <class C>
cudaError_t launch_tangent_sm80(const Problem& p, const Tangents& t, const LaunchPlan& plan, void* workspace,
                                cudaStream_t stream) {
  const TileGrid& grid = plan.queries;
  return launch(tangent_sm80<C>, {grid.blocks, slice_count<C>(p.value_dim)}, C::kThreads, C::kSharedBytes,
                stream, p, t, grid_tiles(p, grid, workspace));
}

template <class T, Row R>
cudaError_t launch_row(const Problem& p, const Tangents& t, const LaunchPlan& plan, void* workspace,
                       cudaStream_t stream) {
  return launch_score<R>(plan.score, [&]<ScoreKind kKind>() {
    return launch_tangent_sm80<TangentSm80<T, R, kKind>>(p, t, plan, workspace, stream);
  });
}

}  // namespace jax_flash::inline JF_ARCH_NAMESPACE
