// The forward for sm_90a: TMA, mbarrier, wgmma, warp specialisation. FlashAttention-3 (Shah et al., 2024).
//
// One block per multiprocessor takes tile after tile. Of the first warpgroup, the producers, one thread finds
// the tiles' work and one has Q, K and V copied; every other warpgroup, a consumer, owns 64 rows of a tile.
// In a consumer S of a tile of keys is made beside P V of the tile before it. docs/hopper-forward.md draws
// it.
#pragma once

#include <algorithm>
#include <type_traits>

#include "core/plan.h"
#include "cuda/block_state.cuh"
#include "cuda/epilogue.cuh"
#include "cuda/forward/sm90_beside.cuh"
#include "cuda/forward/sm90_load.cuh"
#include "cuda/kept_pairs.cuh"
#include "cuda/launch.h"
#include "cuda/mask.cuh"
#include "cuda/ptx/registers.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/registry.h"
#include "cuda/score.cuh"
#include "cuda/segments.cuh"
#include "cuda/single_score.cuh"
#include "cuda/softmax.cuh"
#include "cuda/tile/descriptor.cuh"
#include "cuda/tile/operands.cuh"

namespace jax_flash {

// A row of csrc/kernels.def: Warps are those of the producer and of M / 64 consumers.
template <class T, int HeadDim, int ValueDim, int M, int N, int Stages, int Warps, int Blocks, ScoreKind Kind,
          template <class> class KeySource = DenseKeys>
struct ForwardSm90 {
  using Element = T;
  static constexpr ScoreKind kKind = Kind;
  static constexpr bool kGeneral = Kind == ScoreKind::kGeneral || Kind == ScoreKind::kDropout;
  static constexpr bool kDropout = Kind == ScoreKind::kDropout || Kind == ScoreKind::kDropoutAlone;
  // Scores come to the softmax as powers of two.
  static constexpr bool kScaled = kGeneral || Kind == ScoreKind::kAlibi || Kind == ScoreKind::kSoftcap;
  // Softcap's scores are bounded: no maximum need be known where P has float32's range.
  static constexpr bool kBounded = Kind == ScoreKind::kSoftcap && std::is_same_v<T, __nv_bfloat16>;
  // Dropout's numbers are drawn beside the softmax, not beside the products.
  static constexpr bool kDrawsLate = Kind == ScoreKind::kDropoutAlone;
  // What a kind needs beside the tiles of keys has to fit: those of a bias in shared memory, and dropout's
  // numbers in registers. Where they would not there are fewer keys in a tile.
  static constexpr int kRowBytes = 2 * (M * HeadDim + Stages * N * (HeadDim + ValueDim));
  static constexpr int kBiasStages =
      std::min<int>(2, (kHopperSharedBytes - kHopperStateBytes - kRowBytes) / (2 * M * N));
  static constexpr bool kSmaller = Kind == ScoreKind::kBias && (N % 32 != 0 || kBiasStages < 1);
  static constexpr int kThreads = Warps * 32, kConsumers = Warps / 4 - 1;
  // Three consumers, where there are, take every other kind of score.
  static constexpr bool kGeneralOnly = kConsumers == 2 && HeadDim <= 64;
  static constexpr bool kCrowded = kDrawsLate && kConsumers == 3 && ValueDim == 64;
  static constexpr int kM = M, kN = kSmaller ? 64 : kCrowded ? 96 : N, kStages = Stages, kBlocks = Blocks;
  // Column tiles of S whose exponentials are made beside P V: left alone the assembler has nearly all of them
  // made after it, unless it is kept from it. Three consumers fill the exponential unit anyway.
  static constexpr bool kPaced =
      Kind == ScoreKind::kPlain || (Kind == ScoreKind::kSegments && ValueDim <= 128);
  static constexpr int kEarly = !kPaced || ValueDim > 128 ? kN / 8 : kConsumers > 2 ? 0 : kN / 64 * 3;
  // Read from shared memory once a tile instead of at every step: 2 % where power is the limit.
  static constexpr bool kQueryInRegisters = Kind == ScoreKind::kPlain && HeadDim == 128 && kConsumers == 2;
  static constexpr int kHeadSteps = HeadDim / 16, kKeySteps = kN / 16;
  // Of a thread: what the consumers need, and little for the producer.
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 232 : 160;
  static constexpr int kProducerRegisters = kConsumers == 2 ? 40 : 32;
  using QTile = SharedTile<T, kConsumerRows, HeadDim>;  // of a consumer
  using KTile = SharedTile<T, kN, HeadDim>;
  using VTile = SharedTile<T, kN, ValueDim>;
  using S = Accumulator<1, kN / 8>;
  using O = Accumulator<1, ValueDim / 8>;
  using P = FragmentsA<T, 1, kKeySteps>;
  // Where scores that may lie anywhere are left to the softmax as they are.
  static constexpr bool kFar = Kind == ScoreKind::kPlain || Kind == ScoreKind::kSegments ||
                               Kind == ScoreKind::kDropoutAlone || Kind == ScoreKind::kBias;
  using Softmax = std::conditional_t<kFar, FarSoftmax<S::kSlots, float>, OnlineSoftmax<S::kSlots>>;
  using Keys = KeySource<ForwardSm90>;
  using Beside = typename BesideOf<Kind, T, kN, kSmaller ? 2 : kBiasStages, kConsumers>::type;
  using Shared = ForwardShared<T, QTile, KTile, VTile, Stages, kConsumers, Beside>;
  struct Maps {
    typename Keys::Maps keys;
    typename Beside::Map beside;
  };
  static_assert(M == kConsumers * kConsumerRows && kN % 16 == 0);
  static_assert(sizeof(Shared) <= kConsumers * QTile::kBytes + Stages * (KTile::kBytes + VTile::kBytes) +
                                      Beside::kBytes + kHopperStateBytes);
  static_assert(sizeof(Shared) <= kHopperSharedBytes);
};

// Q in registers, read as its descriptor is.
template <class T, int kSteps>
struct QueryFragments : FragmentsA<T, 1, kSteps> {
  __device__ __forceinline__ const uint32_t (&at(int step) const)[4] { return this->x[0][step]; }
};

// A consumer's registers and its place in the rings; one tile of queries after the other.
template <class C>
struct Consumer {
  using T = typename C::Element;
  using S = typename C::S;
  using QTile = typename C::QTile;
  using KTile = typename C::KTile;
  using VTile = typename C::VTile;

  const Problem& p;
  typename C::Shared& shared;
  const int group;  // of the consumers
  const typename C::Shared::Tile* tile;
  uint32_t round = 0, pair = 0;  // tiles of queries and of keys so far
  Interval whole;                // tiles of keys that all its rows see whole
  S s;
  typename C::O o;
  typename C::P weights;  // P, rounded
  QueryFragments<T, C::kHeadSteps> query;
  typename C::Softmax softmax{1};
  float alpha[S::kSlots];

  __device__ __forceinline__ Consumer(const Problem& problem, typename C::Shared& memory, int index)
      : p(problem), shared(memory), group(index) {}

  // The warp's first row within the sequence. It is found where it is used: registers are few.
  __device__ __forceinline__ int32_t row() const {
    return uniform(tile->work.tile.row) + group * kConsumerRows + ptx::thread_index() % 128 / 32 * 16;
  }

  // The consumers take turns at issuing products, so that one's softmax runs beside another's products.
  __device__ __forceinline__ void wait_turn() const { ptx::sync_group(1 + group, 256); }
  __device__ __forceinline__ void pass_turn() const {
    ptx::arrive_group(1 + (group + 1) % C::kConsumers, 256);
  }

  __device__ __forceinline__ void take_query() {
    const RowsA<QTile> rows(ptx::shared_address(shared.q[group]), ptx::thread_index() % 128 / 32 * 16);
#pragma unroll
    for (int step = 0; step < C::kHeadSteps; ++step) rows.load(query.x[0][step], 0, step);
    ptx::hold(query.x[0]);
    shared.queries[group].leave(round);
  }

  // S = Q Kᵀ  [64, N], on its way
  __device__ __forceinline__ void start_scores(uint32_t at) {
    const RowsDescriptor<KTile> k(ptx::shared_address(shared.k[at % C::kStages]));
    if constexpr (C::kQueryInRegisters) {
      start_scores(query, k);
    } else {
      start_scores(RowsDescriptor<QTile>(ptx::shared_address(shared.q[group])), k);
    }
  }
  template <class Q>
  __device__ __forceinline__ void start_scores(const Q& q, const RowsDescriptor<KTile>& k) {
    ptx::wgmma_fence();
    ptx::Wgmma<T, C::kN>::template multiply<true>(s.x[0], q.at(0), k.at(0));
#pragma unroll
    for (int step = 1; step < C::kHeadSteps; ++step)
      ptx::Wgmma<T, C::kN>::template multiply<false>(s.x[0], q.at(step), k.at(step));
    ptx::wgmma_commit();
  }

  // O ← O + P V  [64, dv], on its way
  __device__ __forceinline__ void start_values(uint32_t at) {
    const ColumnsDescriptor<VTile> v(ptx::shared_address(shared.v[at % C::kStages]));
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < C::kKeySteps; ++step)
      ptx::Wgmma<T, VTile::kColumns>::template multiply<false, 1>(o.x[0], weights.x[0][step], v.at(step));
    ptx::wgmma_commit();
  }

  // What can be known of tile n before S, beside the products. kOddShard: of dropout, slowly.
  struct Ahead {
    KeptPairs<S> kept;
    InSegment in_segment;
  };
  template <bool kOddShard>
  __device__ __forceinline__ Ahead look_ahead(int32_t n) const {
    Ahead ahead{};
    if constexpr (C::kGeneral) ahead.in_segment = in_segment<S>(p, tile->score, tile->band, row(), n * C::kN);
    if (kOddShard || (C::kDropout && !C::kDrawsLate && tile->score.dropout.odd())) {
      ahead.kept = kept_pairs_one_by_one<S>(tile->score, row(), n * C::kN);
    } else if constexpr (C::kDropout && !C::kDrawsLate) {
      ahead.kept = kept_pairs<S>(tile->score, row(), n * C::kN);
    }
    return ahead;
  }

  // S → P = 2^(S − m), C::kEarly column tiles of it, and alpha, which O is still to be multiplied by. `use`:
  // of the rings, for tile n.
  template <bool kMasked, bool kOddShard>
  __device__ __forceinline__ void weigh(int32_t n, [[maybe_unused]] uint32_t use, Ahead& ahead) {
    const int32_t key = n * C::kN;
    [[maybe_unused]] float of_row[S::kSlots];
    if constexpr (C::kGeneral)
      GeneralScore(p, tile->score, tile->band).apply(s, row(), key, nullptr, nullptr, ahead.in_segment);
    if constexpr (C::kKind == ScoreKind::kSegments)
      C::Beside::hide(s, shared, tile->score, tile->band, group, row(), use);
    if constexpr (C::kKind == ScoreKind::kAlibi) add_alibi(s, p, tile->score, tile->band, row(), key, of_row);
    if constexpr (C::kKind == ScoreKind::kBias) C::Beside::add(s, shared, p.spec.scale, group, use);
    if constexpr (C::kKind == ScoreKind::kSoftcap)
      Softcap(p.spec).apply(s, C::kBounded ? softmax.shift[0] : 0);
    if constexpr (kMasked) {
      const bool begins = n < whole.lo, ends = n >= whole.hi;
      if (begins || ends) mask(s, tile->band, row(), key, begins, ends);
    }
    if constexpr (C::kBounded) {
      softmax.exponentiate_shifted(s);
    } else if constexpr (C::kKind == ScoreKind::kAlibi) {
      softmax.follow(s, alpha, of_row);
    } else {
      softmax.follow(s, alpha);
      // Among the exponentials, whose waits they fill: both are long chains.
      if constexpr (C::kDrawsLate && !kOddShard) ahead.kept = kept_pairs<S>(tile->score, row(), key);
      softmax.exponentiate(s, 0, C::kEarly);
    }
  }

  __device__ __forceinline__ void weigh_rest() { softmax.exponentiate(s, C::kEarly, S::kColumnTiles); }

  __device__ __forceinline__ void round_weights(const Ahead& ahead) {
    weights.read(RegistersA<T, S>{s});
    if constexpr (C::kDropout) {
#pragma unroll
      for (int k = 0; k < C::kKeySteps; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) weights.x[0][k][i] &= ahead.kept.mask(i % 2, 2 * k + i / 2);
    }
    ptx::hold(weights.x[0]);
  }

  __device__ __forceinline__ void rescale() {
    if constexpr (!C::kBounded) {
#pragma unroll
      for (int slot = 0; slot < S::kSlots; ++slot) o.scale_row(slot, alpha[slot]);
      ptx::hold(o.x[0]);
    }
  }

  // The last tile of keys comes first. P V of it waits for the next step.
  template <bool kOddShard>
  __device__ __forceinline__ void first_step(int32_t n) {
    ptx::barrier_wait(shared.keys.full_of(pair), shared.keys.phase(pair));
    wait_turn();
    ptx::hold(s.x[0]);
    start_scores(pair);
    pass_turn();
    Ahead ahead = look_ahead<kOddShard>(n);
    ptx::wgmma_wait<0>();
    ptx::hold(s.x[0]);
    shared.keys.leave(pair);
    weigh<true, kOddShard>(n, pair, ahead);
    weigh_rest();
    round_weights(ahead);
    if (n == uniform(tile->tiles.hi) - 1 && tile->last_values < C::kN) clear_values();
  }

  // S of tile n beside P V of tile n + 1.
  template <bool kMasked, bool kOddShard>
  __device__ __forceinline__ void step(int32_t n) {
    const uint32_t next = pair + 1;
    ptx::barrier_wait(shared.keys.full_of(next), shared.keys.phase(next));
    wait_turn();
    ptx::hold(s.x[0]);
    start_scores(next);
    ptx::barrier_wait(shared.values.full_of(pair), shared.values.phase(pair));
    start_values(pair);
    pass_turn();
    Ahead ahead = look_ahead<kOddShard>(n);
    ptx::wgmma_wait<1>();
    ptx::hold(s.x[0]);
    shared.keys.leave(next);
    weigh<kMasked, kOddShard>(n, next, ahead);
    if constexpr (C::kPaced && C::kEarly > 0) ptx::make_before(softmax.l[0] + softmax.l[1]);
    // P is written only where no product is in flight: the compiler would run them one by one.
    ptx::wgmma_wait<0>();
    ptx::hold(o.x[0]);
    ptx::hold(weights.x[0]);
    shared.values.leave(pair);
    weigh_rest();
    rescale();  // O ← α O
    round_weights(ahead);
    pair = next;
  }

  __device__ __forceinline__ void last_values() {
    ptx::barrier_wait(shared.values.full_of(pair), shared.values.phase(pair));
    start_values(pair);
    ptx::wgmma_wait<0>();
    ptx::hold(o.x[0]);
    shared.values.leave(pair);
    ++pair;
  }

  // Values past the sequence's keys may be anything, and 0 · NaN is NaN. Every consumer clears all of them.
  __device__ __forceinline__ void clear_values() {
    ptx::barrier_wait(shared.values.full_of(pair), shared.values.phase(pair));
    const uint32_t v = ptx::shared_address(shared.v[pair % C::kStages]);
    const int thread = threadIdx.x % 128, first = tile->last_values;
    for (int at = thread; at < (C::kN - first) * VTile::kChunks; at += 128)
      ptx::store_shared(v + VTile::offset(first + at / VTile::kChunks, at % VTile::kChunks), uint4{});
    ptx::fence_async_shared();
    ptx::sync_group(1 + C::kConsumers + group, 128);
  }

  // Tiles of keys that none of the consumer's rows sees: what the others wait for.
  __device__ __forceinline__ void stand_by(int32_t tiles) {
    for (; tiles > 0; --tiles, ++pair) {
      ptx::barrier_wait(shared.keys.full_of(pair), shared.keys.phase(pair));
      wait_turn();
      pass_turn();
      shared.keys.leave(pair);
      ptx::barrier_wait(shared.values.full_of(pair), shared.values.phase(pair));
      shared.values.leave(pair);
      if constexpr (C::Beside::kStages > 0) {
        ptx::barrier_wait(shared.beside.full_of(pair), shared.beside.phase(pair));
        shared.beside.leave(pair);
      }
    }
  }

  // From the last to the first: those that end the band, those that all rows see, those that begin it.
  template <bool kOddShard = false>
  __device__ __forceinline__ void visit(const Interval& tiles) {
    whole = uniform(tile->keys[group].whole);
    if constexpr (C::kQueryInRegisters) take_query();
    int32_t n = tiles.hi - 1;
    first_step<kOddShard>(n--);
    if constexpr (!C::kGeneral && !kOddShard) {  // whose code would be too long three times
      for (const int32_t hi = max(tiles.lo, whole.hi); n >= hi; --n) step<true, false>(n);
      for (const int32_t lo = max(tiles.lo, whole.lo); n >= lo; --n) step<false, false>(n);
    }
    for (; n >= tiles.lo; --n) step<true, kOddShard>(n);
    if constexpr (!C::kQueryInRegisters) shared.queries[group].leave(round);
    last_values();
  }

  __device__ __forceinline__ void write_rows() {
    const float factor = C::kDropout ? dropout_scale(p.spec) : 1.0f;
    if constexpr (C::kBounded) softmax.forget_empty();
    finish_rows(o, softmax, tile->lse, tile->work.tile, row(), factor);
    store_rows_from_registers(o, tile->out, row(), tile->work.tile.end);
  }

  __device__ __forceinline__ void run() {
    if (group == C::kConsumers - 1) pass_turn();  // the first consumer begins
    for (;; ++round) {
      ptx::barrier_wait(shared.queries[group].full_of(round), shared.queries[group].phase(round));
      tile = &shared.tiles[round % C::Shared::kTiles];
      if (uniform(tile->done)) return;
      softmax = typename C::Softmax(C::kScaled                     ? 1.0f
                                    : C::kKind == ScoreKind::kBias ? kLog2e
                                                                   : p.spec.scale * kLog2e);
      if constexpr (C::kBounded) softmax.bound(p.spec.softcap);
      o.clear();
      const Interval tiles = uniform(tile->tiles), own = uniform(tile->keys[group].tiles);
      if (own.empty()) {
        stand_by(tiles.size());
        shared.queries[group].leave(round);
      } else {
        stand_by(tiles.hi - own.hi);
        if (C::kDrawsLate && uniform(tile->score.dropout.odd())) {
          if constexpr (C::kDrawsLate) visit<true>(own);
        } else {
          visit(own);
        }
        stand_by(own.lo - tiles.lo);
      }
      write_rows();
      shared.states.leave(round);
    }
  }
};

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    forward_sm90(const __grid_constant__ Problem p, const __grid_constant__ typename C::Maps maps,
                 const __grid_constant__ ForwardTiles tiles) {
  auto& shared = *reinterpret_cast<typename C::Shared*>(ptx::dynamic_shared_1024());
  const int group = uniform(static_cast<int>(threadIdx.x) / 128);
  if (threadIdx.x == 0) shared.init(C::Keys::kWarps + C::Beside::kWarps);
  __syncthreads();
  if (group == 0) {
    ptx::give_registers<C::kProducerRegisters>();
    if (threadIdx.x == 0) Finder<C>{p, tiles, shared}.run();
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    if (1 <= warp && warp <= C::Keys::kWarps && lane < C::Keys::kLanes) Loader<C>{p, maps, shared}.run();
    if constexpr (C::Beside::kWarps > 0)
      if (warp == 1 + C::Keys::kWarps)
        typename C::Beside::template Finder<typename C::Shared>{p, shared}.run();
    if constexpr (C::Beside::kNarrows)
      if (warp == 2 + C::Keys::kWarps)
        typename C::Beside::template Narrower<typename C::Shared>{p, shared}.run();
  } else {
    ptx::take_registers<C::kConsumerRegisters>();
    Consumer<C>(p, shared, group - 1).run();
  }
}

template <class C>
cudaError_t launch_forward_sm90(const Problem& p, const LaunchPlan& plan, void* workspace,
                                cudaStream_t stream) {
  const TileGrid& grid = plan.queries;
  if (grid.blocks == 0) return cudaSuccess;
  typename C::Maps maps;
  if (cudaError_t e = C::Keys::make_maps(maps.keys, p); e != cudaSuccess) return e;
  if (cudaError_t e = C::Beside::make_map(maps.beside, p); e != cudaSuccess) return e;
  ForwardTiles tiles{schedule_of(grid, workspace), static_cast<int32_t>(grid.tiles),
                     static_cast<uint32_t>(grid.blocks), nullptr,
                     heads_together(p, static_cast<uint32_t>(grid.blocks / grid.tiles))};
  if (plan.counter >= 0) {
    tiles.counter = reinterpret_cast<uint32_t*>(static_cast<char*>(workspace) + plan.counter);
    if (cudaError_t e = cudaMemsetAsync(tiles.counter, 0, sizeof(uint32_t), stream); e != cudaSuccess)
      return e;
  }
  return launch(forward_sm90<C>, plan.workers, C::kThreads, sizeof(typename C::Shared), stream, p, maps,
                tiles);
}

}  // namespace jax_flash

// The launch function of one row and dtype, for csrc/cuda/registry.h. Three consumers have no registers for
// all options at once.
#define JF_LAUNCH_FORWARD(kind, dtype, ...) \
  launch_forward_sm90<ForwardSm90<dtype, __VA_ARGS__, ScoreKind::kind>>(p, plan, workspace, stream)
#define JF_CASE(kind, dtype, ...) \
  case ScoreKind::kind:           \
    return JF_LAUNCH_FORWARD(kind, dtype, __VA_ARGS__);
#define JF_DEFINE_LAUNCH(name, dtype, ...)                                                           \
  namespace jax_flash {                                                                              \
  cudaError_t name(const Problem& p, const LaunchPlan& plan, void* workspace, cudaStream_t stream) { \
    using Plain = ForwardSm90<dtype, __VA_ARGS__, ScoreKind::kPlain>;                                \
    if constexpr (Plain::kConsumers <= 2) {                                                          \
      if (plan.score == ScoreKind::kGeneral) return JF_LAUNCH_FORWARD(kGeneral, dtype, __VA_ARGS__); \
      if (plan.score == ScoreKind::kDropout) return JF_LAUNCH_FORWARD(kDropout, dtype, __VA_ARGS__); \
    }                                                                                                \
    if constexpr (!Plain::kGeneralOnly) {                                                            \
      switch (plan.score) {                                                                          \
        JF_CASE(kPlain, dtype, __VA_ARGS__)                                                          \
        JF_CASE(kSegments, dtype, __VA_ARGS__)                                                       \
        JF_CASE(kAlibi, dtype, __VA_ARGS__)                                                          \
        JF_CASE(kSoftcap, dtype, __VA_ARGS__)                                                        \
        JF_CASE(kBias, dtype, __VA_ARGS__)                                                           \
        JF_CASE(kDropoutAlone, dtype, __VA_ARGS__)                                                   \
        default:                                                                                     \
          break;                                                                                     \
      }                                                                                              \
    }                                                                                                \
    return cudaErrorNotSupported;                                                                    \
  }                                                                                                  \
  }
