// The results that a consumer of cuda/forward/hopper.cuh (hopper_consumer.cuh) writes for a query tile: o,
// lse and row_max.
#pragma once

#include "cuda/epilogue.cuh"
#include "cuda/forward/hopper_heads.cuh"
#include "cuda/forward/hopper_partner.cuh"
#include "cuda/forward/hopper_state.cuh"
#include "cuda/forward/hopper_store.cuh"
#include "cuda/row_max.cuh"
#include "cuda/score/dropout.cuh"

namespace jax_flash {

// The location of lse and o of the consumer's rows, at the query tile's head or at one after it.
template <class Consumer>
__device__ __forceinline__ decltype(auto) lse_rows(const Consumer& of) {
  if constexpr (Consumer::Config::kListed) {
    const int32_t head = of.consumer * of.tile->heads_apart();
    LseRows rows = of.tile->lse;
    rows.data += head * of.p.lse.head;
    if (rows.sinks) rows.sinks += head * of.p.sinks.head;
    return rows;
  } else {
    return (of.tile->lse);
  }
}
template <class Consumer>
__device__ __forceinline__ decltype(auto) out_rows(const Consumer& of) {
  if constexpr (Consumer::Config::kListed) {
    auto rows = of.tile->out;
    rows.data += of.consumer * of.tile->heads_apart() * of.p.out.head;
    return rows;
  } else {
    return (of.tile->out);
  }
}

// row_max ← max(row_max, rowmax S), of scores with the shift added: where the softmax has no maximum.
template <class Consumer, class Scores>
__device__ __forceinline__ void raise_maxima(const Consumer& of, const Scores& s) {
  of.wait_part(of.shared.epilogue_pipe);
  const auto& tile = *of.tile;
  const TileWork& work = tile.work.tile;
  raise_row_maxima(s, row_maxima(of.p, tile.lse.data), tile.lse.stride, of.row(), min(work.q_len, work.end),
                   [&](float x, int slot) { return x - of.softmax.shift[slot]; });
}

// lse = (m + log2 Σ P) · ln 2, α ← 1 / Σ P
template <class Consumer>
__device__ __forceinline__ void finish_softmax(Consumer& of) {
  using C = typename Consumer::Config;
  const Problem& p = of.p;
  const auto& tile = *of.tile;
  of.wait_part(of.shared.epilogue_pipe);
  if constexpr (C::Softmax::kBounded) of.softmax.mark_empty_rows();
  if constexpr (C::kPacksHeads) {
    finish_softmax(of.alpha, p, of.softmax, tile.lse, PackedRows(p, p.lse), tile.work.tile, of.row(), 1.0f);
  } else {
    finish_softmax(of.alpha, p, of.softmax, lse_rows(of), tile.work.tile, of.row(),
                   C::Score::kDropout ? dropout_scale(p.spec) : 1.0f);
  }
}

// o ← α O, and row_max ← m if the call asks for it.
template <class Consumer>
__device__ __forceinline__ void write_rows(Consumer& of) {
  using C = typename Consumer::Config;
  constexpr int kSlots = Consumer::S::kSlots;
  const Problem& p = of.p;
  const auto& tile = *of.tile;
  const TileWork& work = tile.work.tile;
  if constexpr (C::kPacksHeads) {
    store_row_maxima<kSlots>(p, of.softmax, tile.lse.data, PackedRows(p, p.lse), work, of.row());
  } else if constexpr (!C::Softmax::kBounded) {
    const StridedRows rows{tile.lse.stride};
    if (owns_rows(of)) store_row_maxima<kSlots>(p, of.softmax, lse_rows(of).data, rows, work, of.row());
  }
  normalise_rows(of.o, of.alpha);
  if constexpr (C::kPacksHeads) {
    store_rows_from_registers(of.o, tile.out.data, tile.out.columns, PackedRows(p, p.out), of.row(),
                              work.end);
  } else if constexpr (C::kStoresByTma) {
    of.shared.out_pipe.of[of.consumer].wait_empty(of.tile_index);
    if (stores_by_tma(p, work, uniform(work.row) + of.consumer * of.rows_apart())) {
      stage_rows<typename C::Element, typename C::OTile>(of.o, of.shared.o.of[of.consumer],
                                                         ptx::thread_index() % 128 / 32 * 16);
    } else {
      store_rows_from_registers(of.o, out_rows(of), of.row(), work.end);
    }
    of.shared.out_pipe.of[of.consumer].arrive_by_warp(of.tile_index);
  } else {
    store_rows_from_registers(of.o, out_rows(of), of.row(), work.end);
  }
}

}  // namespace jax_flash
