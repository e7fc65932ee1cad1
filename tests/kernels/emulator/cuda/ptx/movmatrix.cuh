// As csrc/cuda/ptx/movmatrix.cuh.
#pragma once

#include "emulator.h"

namespace jax_flash::ptx {

inline uint32_t transpose(uint32_t x) {
  struct Argument {
    uint32_t in, out;
  } argument{x, 0};
  emulator::warp_collective(&argument, [](void* const(&all)[32]) {
    auto element = [&](int row, int column) {
      return static_cast<const Argument*>(all[row * 4 + column / 2])->in >> column % 2 * 16 & 0xFFFFu;
    };
    for (int lane = 0; lane < 32; ++lane) {
      const int row = lane / 4, column = lane % 4 * 2;
      static_cast<Argument*>(all[lane])->out = element(column, row) | element(column + 1, row) << 16;
    }
  });
  return argument.out;
}

}  // namespace jax_flash::ptx
