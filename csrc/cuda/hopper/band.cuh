// The band of a tile in shared memory, where the kernels of sm_90a keep it.
#pragma once

#include "core/band.h"
#include "cuda/hopper/roles.cuh"
#include "cuda/work.cuh"

namespace jax_flash {

// Finds the band of a tile. It calls no function, because a warp that has given up registers (setmaxnreg) has
// too few for a call; for the same reason, offsets have 32 bits, as the numbers of tiles do, and the tile is
// read from shared memory again for each operand. These kernels have at most one leading dimension.
__device__ __forceinline__ void find_band(const Problem& p, const BlockWork& work, Band& band) {
  band = make_band(p.spec, work.sequence());
  if (!has_moved_band(p) || work.tile.index < 0) return;
  const auto entry = [&](const View& view) {
    reload_shared();
    return static_cast<uint32_t>(work.leading) * static_cast<uint32_t>(view.leading[0]);
  };
  move_band(
      band, p, [&](const View& position) { return diagonal_shift(position, entry(position)); },
      [&](const View& view) {
        return view.as<const int32_t>()[entry(view) + work.tile.index * static_cast<uint32_t>(view.batch)];
      });
}

}  // namespace jax_flash
