// The producer warps of cuda/bias_gradient/hopper.cuh, and the steps that every role walks through.
#pragma once

#include <cstdint>

#include "cuda/bias_gradient/bias_tile.cuh"
#include "cuda/gradient.cuh"
#include "cuda/hopper/band.cuh"
#include "cuda/hopper/pipeline.cuh"
#include "cuda/hopper/roles.cuh"
#include "cuda/hopper/tma.cuh"
#include "cuda/score/hopper_gradient.cuh"

namespace jax_flash {

// One batch entry and head of a tile of dbias.
struct BiasStep {
  BlockWork work;
  Band band;
  bool fresh;  // the band may differ from that of the step before
};

inline constexpr float kLseOfZeros = 512;  // 2^−x is 0, and kLargeShift is larger

// The tiles and steps that every role walks through.
template <class C>
struct BiasRole {
  using Grid = typename C::Grid;
  const Problem& p;
  typename C::Shared& shared;
  const Grid& grid;
  uint32_t tile_index = 0, step_use = 0;  // tiles and steps so far

  // Finds a batch entry's band. Returns false if no row of the tile sees one of its keys.
  __device__ __forceinline__ bool prepare(BiasStep& step, const BiasTile& tile, int32_t b) const {
    const bool is_kept =
        C::kKeepsBand && b > tile.batch.lo && !p.q_lengths && !p.kv_lengths && !p.spec.moves_band();
    if (!is_kept) {
      const Sequence s = fixed_sequence(reload(p), tile.leading, b);
      step.work = {tile.leading, 0, b, {b, 0, 0, s.q_len, s.k_len, tile.row, tile.row + C::kM, 0}};
      find_band(p, step.work, step.band);
    }
    if constexpr (C::kKeepsBand) step.work.batch_row = step.work.tile.index = b;
    const SeenByTile seen = trim_to_segments<Over::kQueries, kTakesGaps<typename C::Score>>(
        grid.segments, grid.rows, C::kM, p, step.work, step.band.rows(tile.row, tile.row + C::kM));
    return !intersect(seen.any, {tile.column, tile.column + C::kN}).empty();
  }

  // Calls visit(tile, step) for the steps of all tiles, and end(tile) after each tile.
  template <class Visit, class End>
  __device__ __forceinline__ void for_steps(Visit visit, End end) {
    for (;; ++tile_index) {
      shared.number_pipe.wait_full(tile_index);
      const uint32_t number = shared.numbers[tile_index % C::kNumbers];
      if (number >= grid.count) return;
      const BiasTile tile(p, number, grid.rows, grid.columns, C::kM, C::kN);
      const bool alike = !p.q_lengths && !p.kv_lengths && !p.spec.moves_band() && !grid.segments;
      BiasStep step;
      bool seen = false;
      for (int32_t b = tile.batch.lo; b < tile.batch.hi; ++b) {
        step.fresh = b == tile.batch.lo || !alike;
        if (step.fresh) seen = prepare(step, tile, b);
        step.work.batch_row = step.work.tile.index = b;
        if (!seen) continue;
        for (step.work.head = tile.heads.lo; step.work.head < tile.heads.hi; ++step.work.head, ++step_use) {
          visit(tile, step);
          step.fresh = false;
        }
      }
      end(tile);
    }
  }
};
template <class C>
struct BiasProducer : BiasRole<C> {
  const typename C::Maps& maps;

  // One thread fetches the numbers of the CTA's tiles from a counter.
  __device__ __forceinline__ void number_tiles() const {
    for (uint32_t i = 0;; ++i) {
      this->shared.number_pipe.wait_empty(i);
      const uint32_t number = i == 0 ? blockIdx.x : gridDim.x + atomicAdd(this->grid.counter, 1u);
      this->shared.numbers[i % C::kNumbers] = number;
      this->shared.number_pipe.arrive(i);
      if (number >= this->grid.count) return;
    }
  }

  // Loads 64 columns of a tile of query rows and, behind it, of a tile of keys.
  __device__ __forceinline__ void load_pair(uint32_t use, const CUtensorMap& rows, const View& of_rows,
                                            const CUtensorMap& keys, const View& of_keys,
                                            const BiasTile& tile, const BlockWork& work, int32_t kv_head,
                                            int part) const {
    using Rows = typename C::Rows;
    using Keys = typename C::Keys;
    const auto& pipe = this->shared.pair_pipe;
    const uint32_t full = pipe.full_barrier(use),
                   to = ptx::shared_address(this->shared.pairs[use % C::kStages]);
    pipe.wait_empty(use);
    ptx::barrier_expect(full, Rows::kBytes + Keys::kBytes);
    ptx::Coordinates row = coordinates_of(of_rows, work, work.head, tile.row),
                     key = coordinates_of(of_keys, work, kv_head, tile.column);
    row.column = key.column = part * Rows::kColumns;
    load_rows<Rows>(to, 0, rows, full, row);
    load_rows<Keys>(to + Rows::kBytes, 0, keys, full, key);
  }

  // One thread loads the pairs of tiles of every step.
  __device__ __forceinline__ void load_pairs() {
    const Problem& p = this->p;
    this->for_steps(
        [&](const BiasTile& tile, const BiasStep& step) {
          const uint32_t use = 2 * C::kParts * this->step_use;
          const int32_t kv_head = p.kv_head(step.work.head);
          for (int part = 0; part < C::kParts; ++part)
            load_pair(use + part, maps.query, p.query, maps.key, p.key, tile, step.work, kv_head, part);
          for (int part = 0; part < C::kParts; ++part)
            load_pair(use + C::kParts + part, maps.dout, p.dout, maps.value, p.value, tile, step.work,
                      kv_head, part);
        },
        [&](const BiasTile&) { this->shared.number_pipe.release_by_thread(this->tile_index); });
  }

  // One warp loads lse and delta. Rows that are not in use, or see no key, get an lse that makes their P = 0:
  // a finite one past the arrays' last row, where Q, dO and the bias are zeros, so that tiles need no other
  // path there.
  __device__ __forceinline__ void load_statistics() {
    const Problem& p = this->p;
    this->for_steps(
        [&](const BiasTile& tile, const BiasStep& step) {
          const BlockWork& work = step.work;
          const auto from = [&](const View& view) {
            return view.as<const float>() + work.leading * view.leading[0] +
                   view.offset(work.batch_row, work.head, tile.row);
          };
          const float *const lse = from(p.lse), *const delta = from(p.delta);
          constexpr int kRows = C::kM / 32;
          float lses[kRows], deltas[kRows];
#pragma unroll
          for (int i = 0; i < kRows; ++i) {
            const int32_t row = 32 * i + static_cast<int32_t>(threadIdx.x % 32);
            const bool used = tile.row + row < work.tile.q_len;
            lses[i] = used ? lse[row * p.lse.row] : tile.row + row < p.q_rows ? -INFINITY : kLseOfZeros;
            deltas[i] = used ? delta[row * p.delta.row] : 0;
          }
          this->shared.row_pipe.wait_empty(this->step_use);
          auto& to = this->shared.statistics[this->step_use % C::kRowStages];
#pragma unroll
          for (int i = 0; i < kRows; ++i) {
            const int row = 32 * i + static_cast<int>(threadIdx.x % 32);
            to.lse[row] = row_lse(lses[i]);
            to.delta[row] = row_delta(lses[i], deltas[i]);
          }
          ptx::barrier_arrive_by_warp(this->shared.row_pipe.full_barrier(this->step_use));
        },
        [&](const BiasTile&) { this->shared.number_pipe.release(this->tile_index); });
  }

  // One warp loads the bias of each tile that has steps or, with other options, all operands of each step's
  // score.
  __device__ __forceinline__ void load_bias() {
    uint32_t use = 0;
    bool loaded = false;
    this->for_steps(
        [&](const BiasTile& tile, const BiasStep& step) {
          if (loaded) return;
          const Problem& p = reload(this->p);
          ScoreOperands operands;
          operands.prepare<typename C::Score>(p, step.work, step.work.head);
          // One tile of the bias serves sequences of different lengths, so the limits are those of the
          // operand.
          const Band used = C::kGeneral ? step.band : Band{p.q_rows, p.k_rows, 0, 0, 0};
          this->shared.score_pipe.wait_empty(use);
          if constexpr (C::kGeneral) {
            if (threadIdx.x % 32 == 0) this->shared.operands[use % C::Tiles::kStages] = operands;
            __threadfence_block();
          }
          C::Tiles::load(this->shared, p, operands, used, tile.row, tile.column, use++);
          loaded = !C::kGeneral;
        },
        [&](const BiasTile&) {
          loaded = false;
          this->shared.number_pipe.release(this->tile_index);
        });
  }
};

}  // namespace jax_flash
