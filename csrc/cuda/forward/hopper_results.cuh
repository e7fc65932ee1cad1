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
__device__ __forceinline__ decltype(auto) lse_rows(const Consumer& warpgroup) {
  if constexpr (Consumer::Config::kListed) {
    const int32_t head = warpgroup.tile->heads_before(warpgroup.consumer);
    LseRows rows = warpgroup.tile->lse;
    rows.data += head * warpgroup.p.lse.head;
    if (rows.sinks) rows.sinks += head * warpgroup.p.sinks.head;
    return rows;
  } else {
    return (warpgroup.tile->lse);
  }
}
template <class Consumer>
__device__ __forceinline__ decltype(auto) out_rows(const Consumer& warpgroup) {
  if constexpr (Consumer::Config::kListed) {
    auto rows = warpgroup.tile->out;
    rows.data += warpgroup.tile->heads_before(warpgroup.consumer) * warpgroup.p.out.head;
    return rows;
  } else {
    return (warpgroup.tile->out);
  }
}

// lse = (m + log2 Σ P) · ln 2, α ← 1 / Σ P
template <class Consumer>
__device__ __forceinline__ void finish_softmax(Consumer& warpgroup) {
  using C = typename Consumer::Config;
  const Problem& p = warpgroup.p;
  const auto& tile = *warpgroup.tile;
  warpgroup.wait_part(warpgroup.shared.epilogue_pipe);
  if constexpr (C::Softmax::kBounded) warpgroup.softmax.mark_empty_rows();
  float factor = C::Score::kDropout ? dropout_scale(p.spec) : 1.0f;
  if constexpr (C::kWidens) factor = tile.value_scale;
  if constexpr (C::kPacksHeads) {
    finish_softmax(warpgroup.alpha, warpgroup.softmax, tile.lse, PackedRows(p, p.lse), PackedRows(p, p.sinks),
                   tile.work.tile, warpgroup.row(), factor);
  } else {
    finish_softmax(warpgroup.alpha, p, warpgroup.softmax, lse_rows(warpgroup), tile.work.tile,
                   warpgroup.row(), factor);
  }
}

// o ← α O, and row_max ← m if the call asks for it.
template <class Consumer>
__device__ __forceinline__ void write_rows(Consumer& warpgroup) {
  using C = typename Consumer::Config;
  constexpr int kSlots = Consumer::S::kSlots;
  const Problem& p = warpgroup.p;
  const auto& tile = *warpgroup.tile;
  const TileWork& work = tile.work.tile;
  if constexpr (C::kPacksHeads) {
    store_row_maxima<kSlots>(p, warpgroup.softmax, tile.lse.data, PackedRows(p, p.lse), work,
                             warpgroup.row());
  } else {
    const StridedRows rows{tile.lse.stride};
    if (owns_rows(warpgroup))
      store_row_maxima<kSlots>(p, warpgroup.softmax, lse_rows(warpgroup).data, rows, work, warpgroup.row());
  }
  normalise_rows(warpgroup.o, warpgroup.alpha);
  if constexpr (C::kPacksHeads) {
    store_rows_from_registers(warpgroup.o, tile.out.data, tile.out.columns, PackedRows(p, p.out),
                              warpgroup.row(), work.end);
  } else if constexpr (C::kStoresByTma) {
    warpgroup.shared.out_pipe.pipe[warpgroup.consumer].wait_empty(warpgroup.tile_index);
    if (stores_by_tma(p, work, uniform(work.row) + warpgroup.rows_before())) {
      stage_rows<typename C::Element, typename C::OTile>(
          warpgroup.o, warpgroup.shared.o.tile[warpgroup.consumer], ptx::thread_index() % 128 / 32 * 16);
    } else {
      store_rows_from_registers(warpgroup.o, out_rows(warpgroup), warpgroup.row(), work.end);
    }
    warpgroup.shared.out_pipe.pipe[warpgroup.consumer].arrive_by_warp(warpgroup.tile_index);
  } else {
    store_rows_from_registers(warpgroup.o, out_rows(warpgroup), warpgroup.row(), work.end);
  }
}

}  // namespace jax_flash
