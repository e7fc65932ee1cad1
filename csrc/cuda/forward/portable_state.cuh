// Shared memory of the portable forward: BlockState with the operands of a loader. A
// loader is a pair of such a state and the Source that its source() returns, which fills the tile ring.
#pragma once

#include "core/families/portable_layout.h"
#include "core/plan/launch_plan.h"
#include "cuda/block_state.cuh"
#include "cuda/load/dense.cuh"
#include "cuda/load/pages.cuh"

namespace jax_flash::inline JF_ARCH_NAMESPACE {

// Keys and values that lie contiguously.
template <class T, bool kRunning, bool kRanges>
struct DenseState : BlockState<T, kRanges> {
  using Source = RowSource<T, kRunning>;
  static constexpr bool kPaged = false;
  static constexpr bool kScaled = false;  // keys and values have no dequantisation scale
  GlobalRows<const T> key, value;

  __device__ void prepare(const Problem& p, const GridTiles& grid, int32_t block_m, int32_t block_n,
                          int32_t column) {
    BlockState<T, kRanges>::prepare(p, grid, block_m, block_n, column);
    const BlockWork& work = this->work;
    const int32_t kv_head = p.kv_head(work.head), first = work.tile.k_begin;
    key = {p.key.as<const T>() + work.offset(p, p.key, kv_head, first), p.key.row, p.head_dim};
    value = {p.value.as<const T>() + work.offset(p, p.value, kv_head, first) + column, p.value.row,
             p.value_dim - column};
  }
  __device__ __forceinline__ Source source() const { return {key, value, this->end}; }
};

// Keys and values in the pages of a pool. Pool: T, or uint8_t for float8.
template <class T, class Pool, int kRows, int kStages, bool kRanges>
struct PagedState : BlockState<T, kRanges> {
  using Source = PageSource<T, Pool, kRows, kStages>;
  static constexpr bool kPaged = true;
  static constexpr bool kScaled = sizeof(Pool) == 1;  // K = k_scale · stored, V = v_scale · stored
  GlobalPages<Pool> key, value;
  PageTable table;
  float key_scale, value_scale;  // 1 if each page has a scale
  PageScales key_scales, value_scales;
  mutable typename Source::Addresses addresses;
  mutable int32_t tile_numbers[Source::kAhead];

  __device__ void prepare(const Problem& p, const GridTiles& grid, int32_t block_m, int32_t block_n,
                          int32_t column) {
    BlockState<T, kRanges>::prepare(p, grid, block_m, block_n, column);
    const BlockWork& work = this->work;
    const int32_t kv_head = p.kv_head(work.head);
    key = pages_of<Pool>(p, p.key, work.leading, kv_head, p.head_dim);
    value = pages_of<Pool>(p, p.value, work.leading, kv_head, p.value_dim - column);
    value.data += column;
    table = page_table(p.block_tables, p.leading, work.leading, work.tile.index, p.page_size, p.pages);
    key_scale = scale_of_pool(p, p.k_scale, work.leading, kv_head);
    value_scale = scale_of_pool(p, p.v_scale, work.leading, kv_head);
    key_scales = page_scales_of(p, p.k_scale, work.leading, kv_head);
    value_scales = page_scales_of(p, p.v_scale, work.leading, kv_head);
  }
  __device__ __forceinline__ Source source() const {
    return {key, value, key_scales, value_scales, table, this->work.tile.k_len, addresses, tile_numbers};
  }
};

}  // namespace jax_flash::inline JF_ARCH_NAMESPACE
