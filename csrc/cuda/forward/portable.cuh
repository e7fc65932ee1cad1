// The portable forward, which runs on sm_75 and every newer card: FlashAttention-2 (Dao, 2023) with mma.sync,
// ldmatrix and cp.async. Keys and values are dense or lie in pages (forward/portable_state.cuh).
#pragma once

#include <type_traits>

#include "core/families/portable_layout.h"
#include "core/plan/launch_plan.h"
#include "cuda/epilogue.cuh"
#include "cuda/forward/portable_state.cuh"
#include "cuda/launch.h"
#include "cuda/load/ring.cuh"
#include "cuda/mask.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/registry.h"
#include "cuda/row_max.cuh"
#include "cuda/score/portable_variants.cuh"
#include "cuda/slices.cuh"
#include "cuda/softmax.cuh"
#include "cuda/tile/fragments.cuh"
#include "cuda/work.cuh"

namespace jax_flash::inline JF_ARCH_NAMESPACE {

// Keys per tile. If scores are not plain, a warp that owns 32 query rows has registers for fewer keys.
constexpr int forward_keys(const Row& row, ScoreKind kind) {
  if (kind == ScoreKind::kPlain || row.block_m / row.warps == 16) return row.block_n;
  return row.block_n < 64 || row.head_dim > 64 ? 32 : 64;
}

// Whether the dense loader keeps its next addresses in registers (RowSource's kRunning).
constexpr bool keeps_addresses(const Row& row, ScoreKind kind) {
  return kind != ScoreKind::kPlain || (row.block_m / row.warps == 16 && row.stages == 2);
}

// A row of csrc/kernels.def. Each warp owns 16 or 32 query rows. State_: DenseState or PagedState.
template <class T, Row R, ScoreKind Kind,
          class State_ = DenseState<T, keeps_addresses(R, Kind), is_general(Kind)>>
struct ForwardSm80 {
  using Element = T;
  using State = State_;
  static constexpr bool kSliced = R.is_sliced();
  static constexpr int kSliceColumns = R.slice_columns(), kHeadDim = R.head_dim, kValueDim = kSliceColumns;
  static constexpr bool kPlain = Kind == ScoreKind::kPlain, kPermuted = is_general(Kind);
  static constexpr int kM = R.block_m, kN = forward_keys(R, Kind);
  static constexpr int kWarps = R.warps, kThreads = kWarps * 32, kBlocks = R.blocks_for(Kind);
  static constexpr int kWarpRows = kM / kWarps;
  static constexpr int kHeadSteps = kHeadDim / kStepK<T>, kKeySteps = kN / kStepK<T>;
  using QTile = SharedTile<T, kM, kHeadDim>;
  // Permuted tiles give each thread adjacent keys, so that bias and mask are read in wide loads.
  using KTile = SharedTile<T, kN, kHeadDim, kPermuted>;
  using VTile = SharedTile<T, kN, kValueDim, kPermuted>;
  using OTile = SharedTile<T, kM, kValueDim>;
  using S = std::conditional_t<kPermuted, PermutedAccumulator<kWarpRows / 16, kN / 8>,
                               Accumulator<kWarpRows / 16, kN / 8>>;
  using O = Accumulator<kWarpRows / 16, kValueDim / 8>;
  using Score = PortableScore<Kind, S, State::kPaged>;
  using Softmax = typename Score::template Softmax<T, volatile float>;
  static constexpr bool kSkips = Score::reads(Operand::kBlockMask);
  // Calls over pages have no boolean mask.
  using Operands = std::conditional_t<kSkips && !State::kPaged, TileOperands, ScoreOperands>;
  using Ring = TileRing<R.stages, kThreads, KTile, VTile, typename State::Source, kSkips>;
  // Q's fragments stay in registers if 32 registers hold all of them. With two stages and 16 rows per warp,
  // the leading ones do.
  static constexpr int kQRegisters = kWarpRows / 4 * static_cast<int>(sizeof(T)) / 2 * kHeadDim / 16;
  static constexpr bool kQPartly = kPlain && kWarpRows == 16 && R.stages == 2;
  static constexpr int kQSteps = kQRegisters <= 32 ? kHeadSteps
                                 : kQPartly        ? kHeadSteps * 32 / kQRegisters
                                                   : 0;
  using Q = LeadingFragmentsA<T, kWarpRows / 16, kHeadSteps, kQSteps, QTile>;
  static constexpr Row kTile = R.with_tile(kM, kN);
  static constexpr ForwardLayout kLayout = forward_layout(kTile, sizeof(T));
  static constexpr int kSharedBytes = kLayout.bytes;
  static_assert(kLayout.ring - kLayout.q == QTile::kBytes && kLayout.bytes - kLayout.ring == Ring::kBytes);
  static_assert(sizeof(State) <= forward_state_bytes(kTile, State::kPaged));
  static_assert(kWarpRows % 16 == 0 && kN % 32 == 0);
  static_assert(!State::kPaged || kHeadDim <= kMaxHeadDim);  // kNanRow
  // Each warp stores its rows of O over its own rows of Q, so no barrier is needed.
  static_assert(kValueDim <= kHeadDim && QTile::kPitch == OTile::kPitch);
};

// The tile of S of a warp, for its score variant.
template <class C>
struct ForwardTile {
  using Element = typename C::Element;
  const Problem& p;
  const typename C::State& block;
  int32_t warp_row, key;  // where the tile begins, in the query tile and in the sequence

  __device__ __forceinline__ const auto& operands() const {
    return static_cast<const typename C::Operands&>(block.score);
  }
  __device__ __forceinline__ const Band& band() const { return block.band; }
  // The warp's first query row. It is reloaded from shared memory at each use, since no register is left for
  // it.
  __device__ __forceinline__ int32_t row() const {
    return static_cast<const volatile int32_t&>(block.work.tile.row) + warp_row;
  }
  // row_max ← max(row_max, rowmax S). Its operands are reloaded, too.
  template <class S>
  __device__ __forceinline__ void raise_maxima(const S& s, float scale) const {
    const auto& tile = static_cast<const volatile TileWork&>(block.work.tile);
    uint32_t* const to = static_cast<uint32_t* const volatile&>(block.row_max);
    const int32_t used = tile.q_len, end = tile.end;
    raise_row_maxima(s, to, p.row_max.row, row(), min(used, end), [=](float x, int) { return x * scale; });
  }
};

// O ← O + P V  [M, dv] with P = 2^(S − m). The exponentials of later keys overlap the product of earlier
// ones. `numbers`: dropout's random numbers for the first keys, if they were drawn early.
template <class C, class V>
__device__ __forceinline__ void add_values(typename C::O& o, typename C::S& s, const V& v,
                                           typename C::Softmax& softmax, KeptNumbers<typename C::S>& numbers,
                                           const ForwardTile<C>& at) {
  using T = typename C::Element;
  using S = typename C::S;
  constexpr int kSteps = kStepsAtOnce<T>, kTiles = kSteps * kStepK<T> / 8;  // of k; of S, along the keys
  const auto drop_first = [&] {
    softmax.exponentiate(s, 0, S::kColumnTiles);
    at.operands().dropout_at(at.row(), at.key).template elements<S>().drop(s, 0, S::kColumnTiles);
    multiply_add<T, C::kKeySteps>(o, RegistersA<T, S>{s}, v);
  };
  if constexpr (C::Score::kDropout && !C::Score::kDropoutInSoftmax) {
    drop_first();
  } else {
    if (C::Score::kDropout && at.operands().dropout.needs_scalar_path()) return drop_first();
#pragma unroll
    for (int k_step = 0; k_step < C::kKeySteps; k_step += kSteps) {
      const int tile = k_step / kSteps * kTiles;
      if constexpr (C::Score::kDropout)
        if (tile % 4 == 0 && tile > 0) at.operands().dropout_at(at.row(), at.key).draw(numbers, tile);
      softmax.exponentiate(s, tile, tile + kTiles);
      if constexpr (C::Score::kDropout) {
        multiply_add_step<T>(o, DroppedA<T, S>{s, numbers}, v, k_step);
      } else {
        multiply_add_step<T>(o, RegistersA<T, S>{s}, v, k_step);
      }
    }
  }
}

template <class C>
__device__ __forceinline__ void forward_tile(const Problem& p, const typename C::State& block,
                                             uint8_t* shared) {
  using T = typename C::Element;
  using S = typename C::S;
  const TileWork& tile = block.work.tile;
  const int warp_row = static_cast<int>(threadIdx.x) / 32 * C::kWarpRows;
  const uint32_t q_tile = ptx::shared_address(shared) + C::kLayout.q;
  typename C::Ring kv(q_tile + C::kLayout.ring, block.source(), block.tiles);
  typename C::Q q(q_tile, warp_row);
  ForwardTile<C> at{p, block, warp_row, 0};

  typename C::O o;
  o.clear();
  typename C::Softmax softmax(C::Score::template start<typename C::Softmax>(p));

  const auto from = shown_from<C>(p, block);
  const int32_t first = from(block.tiles.lo);
  if (first < block.tiles.hi) {
    load_tile<typename C::QTile, C::kThreads>(q_tile, block.query, tile.row, tile.used_queries());
    kv.start(first, from);
  }
  for (int32_t n = first; n < block.tiles.hi; n = kv.next(n)) {
    const int32_t key = at.key = n * C::kN;
    const RowsB<typename C::KTile> k(kv.wait_first(n, from), 0);
    if constexpr (C::kQSteps > 0) {
      if (n == first) q.read(q_tile, warp_row);
    }
    typename C::Score score;
    score.prefetch(at, key);
    KeptNumbers<S> numbers = {};
    if constexpr (C::Score::kDropoutInSoftmax)
      block.score.dropout_at(at.row(), key).draw(numbers, 0);  // overlaps the product
    S s;
    s.clear();
    multiply_add<T, C::kHeadSteps>(s, q, k);  // S = Q Kᵀ  [M, N]
    if constexpr (C::State::kScaled) {        // S ← k_scale · S
      for_each(s,
               [&](float& x, int, int c, int e) { x *= block.key_scale * kv.key_scale(n, S::column(c, e)); });
    }
    const ColumnsB<typename C::VTile, 16, true> v(kv.wait_second(n), 0);
    score.apply(s, at, softmax);  // softcap, bias, alibi, segments, mask
    if (key < block.whole.lo || key + C::kN > block.whole.hi) mask(s, block.band, at.row(), key);
    if (p.row_max) at.raise_maxima(s, softmax.scale);
    softmax.update_lazily(s, o);  // m ← max(m, rowmax S); O ← α O

    add_values<C>(o, s, v, softmax, numbers, at);  // P = 2^(S − m); O ← O + P V
  }
  kv.finish();

  float factor = C::Score::kDropout ? dropout_scale(p.spec) : 1.0f;
  if constexpr (C::State::kScaled) factor *= block.value_scale;
  LseRows lse;
  lse.prepare(p, block.work);
  float factors[C::S::kSlots];
  finish_softmax(factors, p, softmax, lse, tile, at.row(), factor);  // lse = m + log l
  normalise_rows(o, factors);                                        // O ← O / l
  store_rows<typename C::OTile>(o, shared, warp_row, block.out, at.row(), tile.end);
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocks)
    forward_sm80(const __grid_constant__ Problem p, const __grid_constant__ GridTiles grid) {
  __shared__ typename C::State block;
  if (threadIdx.x == 0) {
    block.prepare(p, grid, C::kM, C::kN, first_column<C>());
    if constexpr (!C::kPlain) block.score.template prepare<typename C::Score>(p, block.work, block.work.head);
  }
  __syncthreads();
  if (block.work.tile.row < block.work.tile.end) forward_tile<C>(p, block, ptx::dynamic_shared());
}

template <class C>
cudaError_t launch_forward_sm80(const Problem& p, const LaunchPlan& plan, void* workspace,
                                cudaStream_t stream) {
  const TileGrid& grid = plan.queries;
  // All slices compute the same S, and so write the same lse and largest scores.
  return launch(forward_sm80<C>, {grid.blocks, slice_count<C>(p.value_dim)}, C::kThreads, C::kSharedBytes,
                stream, p, grid_tiles(p, grid, workspace));
}

// A row whose keys and values lie in pages. Pool: T, or uint8_t for float8.
template <class T, class Pool, Row R, ScoreKind Kind>
using PagedForwardSm80 =
    ForwardSm80<T, R, Kind, PagedState<T, Pool, forward_keys(R, Kind), R.stages, is_general(Kind)>>;

template <class T, Row R>
cudaError_t launch_row(const Problem& p, const LaunchPlan& plan, void* workspace, cudaStream_t stream) {
  const auto run = [&]<class C>(std::type_identity<C>) {
    return launch_forward_sm80<C>(p, plan, workspace, stream);
  };
  if constexpr (R.is_paged()) {  // no kernel for pages has dropout
    if (is_float8(p.kv_dtype))
      return run(std::type_identity<PagedForwardSm80<T, uint8_t, R, ScoreKind::kGeneral>>{});
    if (plan.general()) return run(std::type_identity<PagedForwardSm80<T, T, R, ScoreKind::kGeneral>>{});
    return run(std::type_identity<PagedForwardSm80<T, T, R, ScoreKind::kPlain>>{});
  } else {
    return launch_score<R>(
        plan.score, [&]<ScoreKind kKind>() { return run(std::type_identity<ForwardSm80<T, R, kKind>>{}); });
  }
}

}  // namespace jax_flash::inline JF_ARCH_NAMESPACE
