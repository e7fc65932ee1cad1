// A consumer warpgroup of cuda/forward/hopper.cuh: 64 rows of a query tile. The products S of a key tile and
// P V of the tile before it are in flight together, as in FlashAttention-3.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/forward/hopper_loops.cuh"
#include "cuda/forward/hopper_partner.cuh"
#include "cuda/forward/hopper_results.cuh"
#include "cuda/forward/hopper_score_tile.cuh"
#include "cuda/forward/hopper_state.cuh"
#include "cuda/hopper/pipeline.cuh"
#include "cuda/hopper/roles.cuh"
#include "cuda/mask.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/score/operands.cuh"
#include "cuda/tile/descriptor.cuh"
#include "cuda/tile/operands.cuh"

namespace jax_flash {

// A consumer warpgroup and its registers. It works on one query tile after the other, and on the key tiles of
// a query tile from the last to the first.
template <class C>
struct Consumer {
  using Config = C;
  using T = typename C::Element;
  using S = typename C::S;
  using QTile = typename C::QTile;
  using KTile = typename C::KTile;
  using VTile = typename C::VTile;
  using Score = typename C::Score;

  const Problem& p;
  typename C::Shared& shared;
  const int consumer, team;               // the consumer's number in the team, and the team's in the CTA
  const typename C::Shared::Tile* tile;   // the query tile
  uint32_t tile_index = 0, kv_index = 0;  // query tiles and key tiles so far
  uint32_t messages = 0;                  // between CTAs so far (hopper/row_exchange.cuh)
  uint32_t without_input = 0;             // key tiles so far for which the score's input has no stage
  bool has_input = true;                  // whether the input has stages for this query tile's key tiles
  Interval whole;                         // key tiles that all its rows see whole
  S s;                                    // S [64, N]
  typename C::O o;                        // O [64, dv]
  typename C::P weights;                  // P [64, N], rounded
  FragmentsA<T, 1, C::kQueryInRegisters ? C::kHeadSteps : 1> query;
  typename C::Softmax softmax{1};
  float alpha[S::kSlots];  // O must still be multiplied by this

  __device__ __forceinline__ Consumer(const Problem& problem, typename C::Shared& memory, int in_team,
                                      int in_cta)
      : p(problem), shared(memory), consumer(in_team), team(in_cta) {}

  __device__ __forceinline__ int32_t rows_before() const {
    if constexpr (C::kListed) return uniform(tile->rows_before(consumer));
    return consumer * kConsumerRows;
  }
  // The warp's first row within the sequence, computed at each use to save a register.
  __device__ __forceinline__ int32_t row() const {
    return uniform(tile->work.tile.row) + rows_before() + ptx::thread_index() % 128 / 32 * 16;
  }
  // The first key of tile n.
  __device__ __forceinline__ int32_t key_of(int32_t n) const { return tile->tile(n) * C::kN; }
  __device__ __forceinline__ ConsumerTile<Consumer> score_tile(uint32_t kv_use) const {
    return {*this, kv_use - without_input};
  }

  // Whether consumers alternate. Teams get out of step by themselves, and so do consumers that wait for
  // another CTA.
  static constexpr bool kPingPong = C::kConsumers > 1 && C::kTeams == 1 && C::kSharers == 1;
  __device__ __forceinline__ void wait_for_issue() const {
    if constexpr (kPingPong) IssueTurns<>::wait(consumer);
  }
  __device__ __forceinline__ void allow_next_issue() const {
    if constexpr (kPingPong) IssueTurns<>::allow((consumer + 1) % C::kConsumers);
  }

  // CTAs that share the query tile have Q of one consumer each.
  __device__ __forceinline__ int q_slot() const { return C::kSharers > 1 ? 0 : consumer; }
  __device__ __forceinline__ void load_query() {
    const RowsA<QTile> rows(ptx::shared_address(shared.q[q_slot()]), ptx::thread_index() % 128 / 32 * 16);
#pragma unroll
    for (int step = 0; step < C::kHeadSteps; ++step) rows.load(query.x[0][step], 0, step);
    ptx::hold(query.x[0]);
    shared.q_pipe[q_slot()].release(tile_index);
  }

  // The address of a tile. Descriptors of all k steps of a wide head do not fit in registers.
  static constexpr bool kMakesDescriptors = C::kHasColumns || (C::kWidens && C::kHeadDim > 128);
  static __device__ __forceinline__ uint32_t address(const void* tile) {
    const uint32_t at = ptx::shared_address(tile);
    return kMakesDescriptors ? ptx::here(at) : at;
  }

  // S of a tile's first kKeys keys.
  template <int kKeys>
  __device__ __forceinline__ auto& columns() {
    return reinterpret_cast<Accumulator<1, kKeys / 8>&>(s);
  }

  // Issues S = Q Kᵀ  [64, kKeys], with the first keys of a tile: a group for each part of K's columns.
  // kSends: sends P of the tile before after the third of four groups, while these are multiplied.
  template <int kKeys = C::kN, int kPart = 0, bool kSends = false>
  __device__ __forceinline__ void start_scores(uint32_t use) {
    constexpr int kSteps = C::kHeadSteps / C::kKeyParts, kFirst = kPart * kSteps;
    if constexpr (C::kKeyParts > 1) shared.wait_key(use, kPart);
    const RowsDescriptor<KTile> k(address(shared.key(use, kPart)));
    ptx::wgmma_fence();
    if constexpr (C::kQueryInRegisters) {
      multiply_steps<kKeys, kFirst, kSteps>(query, k);
    } else {
      const RowsDescriptor<QTile> q(address(shared.q[q_slot()]));
      multiply_steps<kKeys, kFirst, kSteps>(q, k);
    }
    ptx::wgmma_commit();
    if constexpr (kSends && kPart == C::kKeyParts / 2) send_weights(*this);
    if constexpr (kPart + 1 < C::kKeyParts) start_scores<kKeys, kPart + 1, kSends>(use);
  }
  // kSteps K steps of Q from kFirst on, with which the K tile begins.
  template <int kKeys, int kFirst, int kSteps, class Q>
  __device__ __forceinline__ void multiply_steps(const Q& q, const RowsDescriptor<KTile>& k) {
    auto& x = columns<kKeys>().x[0];
    using Product = ptx::Wgmma<T, kKeys>;
    Product::template multiply<kFirst == 0>(x, q.at(kFirst), k.at(0));
#pragma unroll
    for (int step = 1; step < kSteps; ++step)
      Product::template multiply<false>(x, q.at(kFirst + step), k.at(step));
  }
  // Waits for S while at most kPending later groups are in flight, and releases K.
  template <int kPending, int kPart = 0>
  __device__ __forceinline__ void finish_scores(uint32_t use) {
    constexpr int kPartsLeft = C::kKeyParts - 1 - kPart;
    ptx::wgmma_wait<kPending + kPartsLeft>();
    if constexpr (kPartsLeft == 0) ptx::hold(s.x[0]);
    shared.release_key(use, kPart);
    if constexpr (kPartsLeft > 0) finish_scores<kPending, kPart + 1>(use);
  }

  // Issues O ← O + P V  [64, dv], with the first kKeys keys of a tile. ptxas allows an instruction only the
  // registers that a thread is launched with, which with a widening warpgroup are fewer than 256 columns of
  // O.
  static constexpr int kValueParts = C::kWidens && VTile::kColumns > 128 ? 2 : 1;
  template <int kKeys = C::kN>
  __device__ __forceinline__ void start_values(uint32_t use) {
    constexpr int kColumns = VTile::kColumns / kValueParts;
    ptx::wgmma_fence();
#pragma unroll
    for (int part = 0; part < kValueParts; ++part) {
      auto& columns = reinterpret_cast<float (&)[kColumns / 8][4]>(o.x[0][part * kColumns / 8]);
      const ColumnsDescriptor<VTile> v(address(shared.value(use)) +
                                       VTile::panel_offset(part * kColumns / kChunk<T>));
#pragma unroll
      for (int step = 0; step < kKeys / 16; ++step)
        ptx::Wgmma<T, kColumns>::template multiply<false, 1>(columns, weights.x[0][step], v.at(step));
    }
    ptx::wgmma_commit();
  }

  // Rare calls have a copy of the loop, kRare, so that the usual loop has no branch for them: dropout whose
  // numbers are drawn one by one, and row_max if the softmax has no maximum.
  static constexpr bool kHasRareLoop = Score::kDropoutInSoftmax || C::Softmax::kBounded;
  __device__ __forceinline__ bool is_rare() const {
    if constexpr (Score::kDropoutInSoftmax) return uniform(tile->score.dropout.needs_scalar_path());
    return C::Softmax::kBounded && p.row_max;
  }

  // S → P, except for the exponentials of some column tiles, which finish_exponentials() computes. `kv_use`:
  // the use of K's pipeline for tile n.
  template <bool kMasked, bool kRare, bool kInput, class Scores>
  __device__ __forceinline__ void start_softmax(Scores& s, int32_t n, uint32_t kv_use, Score& score) {
    const int32_t key = key_of(n);
    auto at = score_tile(kv_use);
    if constexpr (Score::kPositional)
      at.key = key;  // without this the compiler would move key into the masked branch
    if constexpr (kInput) score.apply(s, at, softmax);  // softcap, bias, ALiBi, segments
    if constexpr (C::kRanges) {
      if constexpr (kMasked) score.hide(s);
    } else if constexpr (C::kListed) {
      score.hide(s, at);
    } else if constexpr (kMasked) {
      const bool begins = n < whole.lo, ends = n >= whole.hi;
      if constexpr (C::kPacksHeads) {
        if (begins || ends) score.hide_unseen(s, at);
      } else if (begins || ends) {
        mask(s, tile->band, row(), key, begins, ends);
      }
    }
    if constexpr (kRare && C::Softmax::kBounded) softmax.raise_maxima(s);
    const int early = std::min(C::kEarlyExponentials, Scores::kColumnTiles);
    score.template exponentiate<kRare>(s, at, softmax, alpha, early);  // m, α; P = 2^(S − m)
  }

  template <class Scores>
  __device__ __forceinline__ void finish_exponentials(Scores& s) {
    softmax.exponentiate(s, std::min(C::kEarlyExponentials, Scores::kColumnTiles), Scores::kColumnTiles);
  }

  // P, rounded and with dropout, as the left operand of P V.
  template <class Scores>
  __device__ __forceinline__ void round_weights(const Scores& s, const Score& score) {
    const RegistersA<T, Scores> rounded{s};
#pragma unroll
    for (int k = 0; k < Scores::kColumnTiles / 2; ++k) rounded.load(weights.x[0][k], 0, k);
    score.drop(weights);
    ptx::hold(weights.x[0]);
  }

  // O ← α O. If CTAs share the query tile, most steps leave O as it is: no row of the warp has a new maximum.
  __device__ __forceinline__ void rescale() {
    if constexpr (!C::Softmax::kBounded) {
      if (C::kSharers == 1 || __any_sync(~0u, alpha[0] != 1 || alpha[1] != 1)) {
#pragma unroll
        for (int slot = 0; slot < S::kSlots; ++slot) o.scale_row(slot, alpha[slot]);
      }
      ptx::hold(o.x[0]);
    }
  }

  // S of tile n, or of its first kKeys keys, with no other product in flight. `partial`: with ranges, whether
  // some row does not see all keys.
  template <int kKeys, bool kRare>
  __device__ __forceinline__ Score multiply_scores(int32_t n, bool partial = true) {
    if constexpr (C::kKeyParts == 1) shared.wait_key(kv_index);
    wait_for_issue();
    ptx::hold(s.x[0]);
    start_scores<kKeys>(kv_index);  // S = Q Kᵀ
    allow_next_issue();
    Score score;
    score.template prefetch<kRare>(score_tile(kv_index), key_of(n));
    if constexpr (C::kRanges) {
      if (partial) {
        score.find_seen(score_tile(kv_index), key_of(n));
      } else {
        score.see_all();
      }
    }
    finish_scores<0>(kv_index);
    return score;
  }

  // P V of a tile, or of its first kKeys keys, with no other product in flight. The last one overlaps the end
  // of the softmax.
  template <int kKeys, bool kLast>
  __device__ __forceinline__ void multiply_values() {
    shared.wait_value(kv_index);
    start_values<kKeys>(kv_index);  // O ← O + P V
    send_weights(*this);
    if constexpr (kLast) finish_softmax(*this), send_factors(*this);
    ptx::wgmma_wait<0>();
    ptx::hold(o.x[0]);
    shared.release_value(kv_index);
    ++kv_index;
  }

  // The visible tail of the last key tile.
  template <bool kRare, bool kInput>
  __device__ __forceinline__ void tail_step(int32_t n) {
    auto& tail = columns<C::kTailKeys>();
    Score score = multiply_scores<C::kTailKeys, kRare>(n);
    start_softmax<true, kRare, kInput>(tail, n, kv_index, score);
    finish_exponentials(tail);
    round_weights(tail, score);
    clear_values<C::kTailKeys>(*this, n);
    multiply_values<C::kTailKeys, false>();
  }

  // tail_step() for tile n, if the consumer's rows see no key behind its tail and it is not their only tile.
  template <bool kRare, bool kInput>
  __device__ __forceinline__ bool take_tail(int32_t& n, int32_t first) {
    if constexpr (C::kTailKeys > 0) {
      const bool tail = n > first && uniform(tile->keys[consumer].end) - key_of(n) <= C::kTailKeys;
      if (tail) tail_step<kRare, kInput>(n--);
      return tail;
    }
    return false;
  }

  // The first whole key tile, whose P V is left to the next step.
  template <bool kRare, bool kInput>
  __device__ __forceinline__ void first_step(int32_t n, bool after_tail, bool partial = true) {
    Score score = multiply_scores<C::kN, kRare>(n, partial);
    start_softmax<true, kRare, kInput>(s, n, kv_index, score);
    finish_exponentials(s);
    if (C::kTailKeys > 0 && after_tail) rescale();
    round_weights(s, score);
    clear_values<C::kN>(*this, n);
  }

  // If a step is long, a copy of it for the first key tile would double the compile time.
  static constexpr bool kOneStep = Score::kGeneral && C::kSharers == 1 && C::kTailKeys == 0;

  // S of tile n while O ← O + P V of tile n + 1 is multiplied. `first`, with kOneStep: there is no such tile.
  template <bool kMasked, bool kRare, bool kInput>
  __device__ __forceinline__ void step(int32_t n, bool first = false) {
    const bool follows = !kOneStep || !first;
    const uint32_t next = kv_index + follows;
    if constexpr (C::kKeyParts == 1) shared.wait_key(next);
    wait_for_issue();
    ptx::hold(s.x[0]);
    start_scores<C::kN, 0, true>(next);                                // S = Q K_nᵀ  [64, N]
    if (follows) shared.wait_value(kv_index), start_values(kv_index);  // O ← O + P V_n+1  [64, dv]
    if (!follows) ptx::wgmma_commit();                                 // an empty group
    allow_next_issue();
    Score score;
    score.template prefetch<kRare>(score_tile(next), key_of(n));
    if constexpr (C::kRanges && kMasked) score.find_seen(score_tile(next), key_of(n));
    finish_scores<1>(next);
    start_softmax<kMasked, kRare, kInput>(s, n, next, score);  // S ← score(S); m, α; P = 2^(S − m)
    if constexpr (C::kHoldsExponentials && C::kEarlyExponentials > 0)
      ptx::make_before(softmax.l[0] + softmax.l[1]);
    // The fragments of P are written only while no product is in flight, because otherwise the compiler
    // serialises the products.
    ptx::wgmma_wait<0>();
    ptx::hold(o.x[0]);
    ptx::hold(weights.x[0]);
    if (follows) shared.release_value(kv_index);
    finish_exponentials(s);
    rescale();  // O ← α O
    round_weights(s, score);
    if (!follows) clear_values<C::kN>(*this, n);
    kv_index = next;
  }

  // Releases key tiles that none of the consumer's rows sees: the other consumers' loads wait for that.
  __device__ __forceinline__ void skip(int32_t tiles) {
    for (; tiles > 0; --tiles, ++kv_index) {
      if (owns_rows(*this)) {
#pragma unroll
        for (int part = 0; part < C::kKeyParts; ++part) {
          shared.wait_key(kv_index, part);
          if (part == 0) wait_for_issue(), allow_next_issue();
          shared.release_key(kv_index, part);
        }
      }
      shared.wait_value(kv_index);
      shared.release_value(kv_index);
      if constexpr (C::Input::kStages > 0) {
        if (!has_input || !owns_rows(*this)) continue;
        shared.input_pipe.wait_full(kv_index - without_input);
        shared.input_pipe.release(kv_index - without_input);
      }
    }
  }

  // Waits for a part of the tile's state that the scheduler publishes separately.
  template <class Pipe>
  __device__ __forceinline__ void wait_part(const Pipe& part) const {
    if constexpr (C::kEarlyLoad) part.wait_full(tile_index);
  }

  __device__ __forceinline__ void run() {
    if (consumer == C::kConsumers - 1) allow_next_issue();  // the first consumer begins
    for (;; ++tile_index) {
      if (owns_rows(*this)) shared.q_pipe[q_slot()].wait_full(tile_index);
      tile = &shared.tiles[tile_index % kTileStates];
      wait_part(shared.consumer_pipe);
      if (uniform(tile->done)) return;
      softmax = typename C::Softmax(Score::template start<typename C::Softmax>(p));
      if constexpr (C::kWidens) softmax.scale *= tile->key_scale;
      o.clear();
      Interval tiles = uniform(tile->tiles), own = uniform(tile->keys[consumer].tiles);
      if constexpr (C::Input::kSkipsUniformTiles) has_input = !uniform(tile->one_segment);
      skip(tiles.hi - own.hi);
      if (!owns_rows(*this)) {
        if constexpr (C::kSharers > 1) attend_as_partner(*this, own);
        wait_part(shared.epilogue_pipe);
      } else if (own.empty()) {
        shared.q_pipe[q_slot()].release(tile_index);
        finish_softmax(*this), send_factors(*this);
      } else if (is_rare()) {
        if constexpr (kHasRareLoop) attend<true>(*this, own);
      } else if (C::Input::kSkipsUniformTiles && !has_input) {
        if constexpr (C::Input::kSkipsUniformTiles) attend<false, false>(*this, own);
      } else if constexpr (C::kRanges) {
        attend_to_ranges(*this);
      } else {
        attend(*this, own);
      }
      if constexpr (C::kRanges)  // read again, because the loop needs the registers
        tiles = uniform(tile->tiles), own = uniform(tile->keys[consumer].tiles);
      skip(own.lo - tiles.lo);
      if (C::Input::kSkipsUniformTiles && !has_input) without_input += tiles.size();
      write_rows(*this);
      shared.state_pipe.release(tile_index);
    }
  }
};

}  // namespace jax_flash
