// A tile of dbias, and the tiles of dS that are summed in it.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/band.h"
#include "core/problem.h"

namespace jax_flash {

// Tile `number` of dbias, and the batch entries, heads, query tiles and key tiles that it sums over.
struct BiasTile {
  int64_t leading;
  Interval batch, heads, row_tiles, key_tiles;
  int32_t b, h, row, column;  // where the tile begins in dbias

  __device__ __forceinline__ BiasTile(const Problem& p, uint32_t number, int32_t rows, int32_t columns,
                                      int32_t block_m, int32_t block_n) {
    uint32_t rest = number;
    column = static_cast<int32_t>(rest % columns) * block_n, rest /= columns;
    row = static_cast<int32_t>(rest % rows) * block_m, rest /= rows;
    h = static_cast<int32_t>(rest % p.dbias_heads), rest /= p.dbias_heads;
    b = static_cast<int32_t>(rest % p.dbias_batch), leading = rest / p.dbias_batch;
    batch = p.dbias_batch == 1 ? Interval{0, p.batch} : Interval{b, b + 1};
    heads = p.dbias_heads == 1 ? Interval{0, p.heads} : Interval{h, h + 1};
    row_tiles = tiles(p.dbias_rows, p.q_rows, row, block_m);
    key_tiles = tiles(p.dbias_columns, p.k_rows, column, block_n);
  }

  // A dimension of dbias with size 1 is summed over all `count` rows, any other only over the block's own
  // tile.
  __device__ __forceinline__ static Interval tiles(int32_t size, int32_t count, int32_t at, int32_t block) {
    if (size > 1) return {at / block, at / block + 1};
    return {0, static_cast<int32_t>(ceil_div(count, block))};
  }
};

}  // namespace jax_flash
