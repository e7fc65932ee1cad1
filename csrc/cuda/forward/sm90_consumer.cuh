// A consumer of cuda/forward/sm90.cuh: 64 rows of a tile of queries, S beside P V of the tile of keys before.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/dropout.cuh"
#include "cuda/epilogue.cuh"
#include "cuda/forward/sm90_shared.cuh"
#include "cuda/mask.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/score.cuh"
#include "cuda/segments.cuh"
#include "cuda/single_score.cuh"
#include "cuda/softmax.cuh"
#include "cuda/tile/descriptor.cuh"
#include "cuda/tile/operands.cuh"

namespace jax_flash {

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
  const int group, team;  // its number in the team; the team's in the block
  const typename C::Shared::Tile* tile;
  uint32_t round = 0, pair = 0;  // tiles of queries and of keys so far
  Interval whole;                // tiles of keys that all its rows see whole
  S s;
  typename C::O o;
  typename C::P weights;  // P, rounded
  QueryFragments<T, C::kHeadSteps> query;
  typename C::Softmax softmax{1};
  float alpha[S::kSlots];

  __device__ __forceinline__ Consumer(const Problem& problem, typename C::Shared& memory, int in_team,
                                      int of_block)
      : p(problem), shared(memory), group(in_team), team(of_block) {}

  // The warp's first row within the sequence. It is found where it is used: registers are few.
  __device__ __forceinline__ int32_t row() const {
    return uniform(tile->work.tile.row) + group * kConsumerRows + ptx::thread_index() % 128 / 32 * 16;
  }

  // The consumers take turns at issuing products, so that one's softmax runs beside another's products. Those
  // of teams fall out of step by themselves.
  static constexpr bool kTurns = C::kConsumers > 1 && C::kTeams == 1;
  __device__ __forceinline__ void wait_turn() const {
    if constexpr (kTurns) ptx::sync_group(1 + group, 256);
  }
  __device__ __forceinline__ void pass_turn() const {
    if constexpr (kTurns) ptx::arrive_group(1 + (group + 1) % C::kConsumers, 256);
  }

  // Of a cluster the block that copies into the stage is told.
  template <uint32_t kCopier, class R>
  __device__ __forceinline__ static void leave(const R& ring, uint32_t use) {
    if constexpr (C::kCluster == 1) {
      ring.leave(use);
    } else {
      ptx::barrier_arrive_in_by_warp(ring.empty_of(use), kCopier);
    }
  }
  __device__ __forceinline__ void leave_keys(uint32_t use) const { leave<kCopiesKeys>(shared.keys, use); }
  __device__ __forceinline__ void leave_values(uint32_t use) const {
    leave<kCopiesValues>(shared.values, use);
  }

  __device__ __forceinline__ void take_query() {
    const RowsA<QTile> rows(ptx::shared_address(shared.q[group]), ptx::thread_index() % 128 / 32 * 16);
#pragma unroll
    for (int step = 0; step < C::kHeadSteps; ++step) rows.load(query.x[0][step], 0, step);
    ptx::hold(query.x[0]);
    shared.queries[group].leave(round);
  }

  // S of the first keys of a tile.
  template <int kKeys>
  __device__ __forceinline__ auto& columns() {
    return reinterpret_cast<Accumulator<1, kKeys / 8>&>(s);
  }

  // S = Q Kᵀ  [64, N], on its way; or of the first kKeys of a tile.
  template <int kKeys = C::kN>
  __device__ __forceinline__ void start_scores(uint32_t at) {
    const RowsDescriptor<KTile> k(ptx::shared_address(shared.k[at % C::kStages]));
    if constexpr (C::kQueryInRegisters) {
      start_scores(columns<kKeys>(), query, k);
    } else {
      start_scores(columns<kKeys>(), RowsDescriptor<QTile>(ptx::shared_address(shared.q[group])), k);
    }
  }
  template <class Scores, class Q>
  __device__ __forceinline__ void start_scores(Scores& scores, const Q& q, const RowsDescriptor<KTile>& k) {
    using Product = ptx::Wgmma<T, 8 * Scores::kColumnTiles>;
    ptx::wgmma_fence();
    Product::template multiply<true>(scores.x[0], q.at(0), k.at(0));
#pragma unroll
    for (int step = 1; step < C::kHeadSteps; ++step)
      Product::template multiply<false>(scores.x[0], q.at(step), k.at(step));
    ptx::wgmma_commit();
  }

  // O ← O + P V  [64, dv], on its way; or of the first kKeys.
  template <int kKeys = C::kN>
  __device__ __forceinline__ void start_values(uint32_t at) {
    const ColumnsDescriptor<VTile> v(ptx::shared_address(shared.v[at % C::kStages]));
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step)
      ptx::Wgmma<T, VTile::kColumns>::template multiply<false, 1>(o.x[0], weights.x[0][step], v.at(step));
    ptx::wgmma_commit();
  }

  // What can be known of tile n before S, beside the products. kOddDropout: its bits one by one.
  struct Ahead {
    KeptTile<S> kept;
    InSegment in_segment;
  };
  template <bool kOddDropout>
  __device__ __forceinline__ Ahead look_ahead(int32_t n) const {
    Ahead ahead{};
    if constexpr (C::kGeneral) ahead.in_segment = in_segment<S>(p, tile->score, tile->band, row(), n * C::kN);
    if constexpr (C::kDropout) {
      if (kOddDropout || (!C::kDrawsLate && tile->score.dropout.odd())) {
        ahead.kept = tile->score.dropout_at(row(), n * C::kN).template numbers_one_by_one<S>();
      } else if constexpr (!C::kDrawsLate) {
        ahead.kept = tile->score.dropout_at(row(), n * C::kN).template numbers<S>();
      }
    }
    return ahead;
  }

  // S → P = 2^(S − m), C::kEarly column tiles of it, and alpha, which O is still to be multiplied by. `use`:
  // of the rings, for tile n.
  template <bool kMasked, bool kOddDropout, class Scores>
  __device__ __forceinline__ void weigh(Scores& s, int32_t n, [[maybe_unused]] uint32_t use, Ahead& ahead) {
    const int32_t key = n * C::kN;
    [[maybe_unused]] float of_row[S::kSlots];
    if constexpr (C::kGeneral) {
      if (p.spec.softcap > 0 && !all_seen(s, tile->band, row(), key)) clear_unseen(s, tile->band, row(), key);
      GeneralScore(p, tile->score, tile->band).apply(s, row(), key, nullptr, nullptr, ahead.in_segment);
    }
    if constexpr (C::kKind == ScoreKind::kSegments)
      C::Beside::hide(s, shared, tile->score, tile->band, group, row(), use);
    if constexpr (C::kKind == ScoreKind::kAlibi) add_alibi(s, p, tile->score, tile->band, row(), key, of_row);
    if constexpr (C::kKind == ScoreKind::kBias) C::Beside::add(s, shared, p.spec.scale, group, use);
    if constexpr (C::kKind == ScoreKind::kSoftcap)
      Softcap(p.spec).apply(s, C::kBounded ? softmax.shift[0] : 0, tile->band, [this] { return row(); }, key);
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
      if constexpr (C::kDrawsLate && !kOddDropout)
        ahead.kept = tile->score.dropout_at(row(), key).template numbers<S>();
      softmax.exponentiate(s, 0, std::min(C::kEarly, Scores::kColumnTiles));
    }
  }

  template <class Scores>
  __device__ __forceinline__ void weigh_rest(Scores& s) {
    softmax.exponentiate(s, std::min(C::kEarly, Scores::kColumnTiles), Scores::kColumnTiles);
  }

  template <class Scores>
  __device__ __forceinline__ void round_weights(const Scores& s, const Ahead& ahead) {
    const RegistersA<T, Scores> rounded{s};
#pragma unroll
    for (int k = 0; k < Scores::kColumnTiles / 2; ++k) rounded.load(weights.x[0][k], 0, k);
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

  // S of tile n, or of its first kKeys, beside no other product.
  template <int kKeys, bool kOddDropout>
  __device__ __forceinline__ Ahead scores_alone(int32_t n) {
    ptx::barrier_wait(shared.keys.full_of(pair), shared.keys.phase(pair));
    wait_turn();
    ptx::hold(s.x[0]);
    start_scores<kKeys>(pair);
    pass_turn();
    const Ahead ahead = look_ahead<kOddDropout>(n);
    ptx::wgmma_wait<0>();
    ptx::hold(s.x[0]);
    leave_keys(pair);
    return ahead;
  }

  // P V of a tile, or of its first kKeys, likewise; beside the last one the softmax is finished.
  template <int kKeys, bool kLast>
  __device__ __forceinline__ void values_alone() {
    ptx::barrier_wait(shared.values.full_of(pair), shared.values.phase(pair));
    start_values<kKeys>(pair);
    if constexpr (kLast) finish_softmax();
    ptx::wgmma_wait<0>();
    ptx::hold(o.x[0]);
    leave_values(pair);
    ++pair;
  }

  // The last tile of keys where few of it are seen: these alone, P V too.
  __device__ __forceinline__ void few_keys(int32_t n) {
    auto& seen = columns<C::kFew>();
    Ahead ahead = scores_alone<C::kFew, false>(n);
    weigh<true, false>(seen, n, pair, ahead);
    weigh_rest(seen);
    round_weights(seen, ahead);
    if (n == uniform(tile->tiles.hi) - 1 && tile->last_values < C::kFew) clear_values(C::kFew);
    values_alone<C::kFew, false>();
  }

  // The last tile of keys comes first, but for few. P V of it waits for the next step.
  template <bool kOddDropout>
  __device__ __forceinline__ void first_step(int32_t n, bool after_few) {
    Ahead ahead = scores_alone<C::kN, kOddDropout>(n);
    weigh<true, kOddDropout>(s, n, pair, ahead);
    weigh_rest(s);
    if (C::kFew > 0 && after_few) rescale();
    round_weights(s, ahead);
    if (n == uniform(tile->tiles.hi) - 1 && tile->last_values < C::kN) clear_values(C::kN);
  }

  // S of tile n beside P V of tile n + 1.
  template <bool kMasked, bool kOddDropout>
  __device__ __forceinline__ void step(int32_t n) {
    const uint32_t next = pair + 1;
    ptx::barrier_wait(shared.keys.full_of(next), shared.keys.phase(next));
    wait_turn();
    ptx::hold(s.x[0]);
    start_scores(next);
    ptx::barrier_wait(shared.values.full_of(pair), shared.values.phase(pair));
    start_values(pair);
    pass_turn();
    Ahead ahead = look_ahead<kOddDropout>(n);
    ptx::wgmma_wait<1>();
    ptx::hold(s.x[0]);
    leave_keys(next);
    weigh<kMasked, kOddDropout>(s, n, next, ahead);
    if constexpr (C::kPaced && C::kEarly > 0) ptx::make_before(softmax.l[0] + softmax.l[1]);
    // P is written only where no product is in flight: the compiler would run them one by one.
    ptx::wgmma_wait<0>();
    ptx::hold(o.x[0]);
    ptx::hold(weights.x[0]);
    leave_values(pair);
    weigh_rest(s);
    rescale();  // O ← α O
    round_weights(s, ahead);
    pair = next;
  }

  // Values past the sequence's keys may be anything, and 0 · NaN is NaN. Every consumer clears all those that
  // it reads, the tile's rows before `end`.
  __device__ __forceinline__ void clear_values(int32_t end) {
    ptx::barrier_wait(shared.values.full_of(pair), shared.values.phase(pair));
    const uint32_t v = ptx::shared_address(shared.v[pair % C::kStages]);
    const int thread = threadIdx.x % 128, first = tile->last_values;
    for (int at = thread; at < (end - first) * VTile::kChunks; at += 128)
      ptx::store_shared(v + VTile::offset(first + at / VTile::kChunks, at % VTile::kChunks), uint4{});
    ptx::fence_async_shared();
    ptx::sync_group(1 + C::kConsumers * (1 + team) + group, 128);
  }

  // Tiles of keys that none of the consumer's rows sees: what the others wait for.
  __device__ __forceinline__ void stand_by(int32_t tiles) {
    for (; tiles > 0; --tiles, ++pair) {
      ptx::barrier_wait(shared.keys.full_of(pair), shared.keys.phase(pair));
      wait_turn();
      pass_turn();
      leave_keys(pair);
      ptx::barrier_wait(shared.values.full_of(pair), shared.values.phase(pair));
      leave_values(pair);
      if constexpr (C::Beside::kStages > 0) {
        ptx::barrier_wait(shared.beside.full_of(pair), shared.beside.phase(pair));
        shared.beside.leave(pair);
      }
    }
  }

  // From the last to the first: those that end the band, those that all rows see, those that begin it.
  template <bool kOddDropout = false>
  __device__ __forceinline__ void visit(const Interval& tiles) {
    whole = uniform(tile->keys[group].whole);
    if constexpr (C::kQueryInRegisters) take_query();
    int32_t n = tiles.hi - 1;
    bool few = false;
    if constexpr (C::kFew > 0) {
      few = n > tiles.lo && uniform(tile->keys[group].end) - n * C::kN <= C::kFew;
      if (few) few_keys(n--);
    }
    first_step<kOddDropout>(n--, few);
    if constexpr (C::kGeneral || kOddDropout) {  // their code would be too long twice
      for (; n >= tiles.lo; --n) step<true, kOddDropout>(n);
    } else {
      const int32_t lo = max(tiles.lo, whole.lo);
#pragma unroll 1
      for (int32_t end = max(tiles.lo, whole.hi); n >= tiles.lo; end = tiles.lo) {
        for (; n >= end; --n) step<true, false>(n);
        for (; n >= lo; --n) step<false, false>(n);
      }
    }
    if constexpr (!C::kQueryInRegisters) shared.queries[group].leave(round);
    values_alone<C::kN, true>();
  }

  // What the finder leaves after it has told the loader.
  template <class R>
  __device__ __forceinline__ void await(const R& ring) const {
    if constexpr (C::kInParts) ptx::barrier_wait(ring.full_of(round), ring.phase(round));
  }

  // lse, and what O is still to be multiplied by, in alpha's place.
  __device__ __forceinline__ void finish_softmax() {
    await(shared.outputs);
    if constexpr (C::kBounded) softmax.forget_empty();
    jax_flash::finish_softmax(alpha, softmax, tile->lse, tile->work.tile, row(),
                              C::kDropout ? dropout_scale(p.spec) : 1.0f);
  }

  __device__ __forceinline__ void write_rows() {
    normalise_rows(o, alpha);
    store_rows_from_registers(o, tile->out, row(), tile->work.tile.end);
  }

  __device__ __forceinline__ void run() {
    if (group == C::kConsumers - 1) pass_turn();  // the first consumer begins
    for (;; ++round) {
      ptx::barrier_wait(shared.queries[group].full_of(round), shared.queries[group].phase(round));
      tile = &shared.tiles[round % C::Shared::kTiles];
      await(shared.prepared);
      if (uniform(tile->done)) return;
      softmax = typename C::Softmax(C::kScaled                     ? 1.0f
                                    : C::kKind == ScoreKind::kBias ? kLog2e
                                                                   : p.spec.scale * kLog2e);
      if constexpr (C::kBounded) softmax.bound(p.spec.softcap);
      o.clear();
      const Interval tiles = uniform(tile->tiles), own = uniform(tile->keys[group].tiles);
      stand_by(tiles.hi - own.hi);
      if (own.empty()) {
        shared.queries[group].leave(round);
        finish_softmax();
      } else if (C::kDrawsLate && uniform(tile->score.dropout.odd())) {
        if constexpr (C::kDrawsLate) visit<true>(own);
      } else {
        visit(own);
      }
      stand_by(own.lo - tiles.lo);
      write_rows();
      shared.states.leave(round);
    }
  }
};

}  // namespace jax_flash
