// The location of a query tile's operands, for the portable forward.
#pragma once

#include "core/problem.h"
#include "cuda/score/tile_operands.cuh"
#include "cuda/tile/copy.cuh"
#include "cuda/work.cuh"

namespace jax_flash {

// The state of a CTA's query tile that all its threads need. It is in shared memory, because registers are
// full of S and O.
template <class T, bool kRanges>
struct BlockState : GapOfTiles<kRanges> {
  BlockWork work;
  Band band;
  TileOperands score;  // for general kernels
  Interval tiles;      // key tiles in which any row of the query tile sees a key
  Interval whole;      // keys that all its rows see
  int32_t end;         // one past the last key that is read
  GlobalRows<const T> query;
  GlobalRows<T> out;
  uint32_t* row_max;  // at the sequence's first row, if the call asks for it

  // `column`: the first column of V and O that the CTA works on.
  __device__ void prepare(const Problem& p, const GridTiles& grid, int32_t block_m, int32_t block_n,
                          int32_t column) {
    work = find_work<Over::kQueries>(p, grid, block_m);
    const int32_t head = work.head;
    const TileWork& tile = work.tile;
    band = work.band(p);
    const SeenByTile visible = trim_to_segments<Over::kQueries, kRanges>(
        grid.segments, grid.count, block_m, p, work, band.rows(tile.row, tile.used_queries()));
    tiles = tiles_of(visible.any, block_n);
    this->set_gap(visible.gap, block_n);
    whole = band.common(tile.row, tile.used_queries());
    end = min(tiles.hi * block_n, tile.k_len);
    query = {p.query.as<const T>() + work.offset(p, p.query, head, tile.q_begin), p.query.row, p.head_dim};
    out = {p.out.as<T>() + work.offset(p, p.out, head, tile.q_begin) + column, p.out.row,
           p.value_dim - column};
    score.prepare_tiles(grid, work);
    row_max = p.row_max.as<uint32_t>();
    if (row_max) row_max += work.offset(p, p.row_max, head, tile.q_begin);
  }
};

}  // namespace jax_flash
