// As csrc/cuda/ptx/ldmatrix.cuh.
#pragma once

#include "emulator.h"

namespace jax_flash::ptx {

template <bool kTransposed>
void emulated_ldmatrix(uint32_t (&r)[4], uint32_t address) {
  struct Argument {
    uint32_t* r;
    uint32_t address;
  } argument{r, address};
  emulator::warp_collective(&argument, [](void* const(&all)[32]) {
    auto element = [&](int matrix, int row, int column) {
      const auto* from = static_cast<const Argument*>(all[matrix * 8 + row]);
      uint16_t x;
      std::memcpy(&x, emulator::shared + from->address + column * 2, 2);
      return uint32_t{x};
    };
    for (int lane = 0; lane < 32; ++lane) {
      const int row = lane / 4, column = lane % 4 * 2;
      for (int m = 0; m < 4; ++m) {
        const uint32_t low = kTransposed ? element(m, column, row) : element(m, row, column);
        const uint32_t high = kTransposed ? element(m, column + 1, row) : element(m, row, column + 1);
        static_cast<Argument*>(all[lane])->r[m] = low | high << 16;
      }
    }
  });
}
inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) { emulated_ldmatrix<false>(r, address); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) { emulated_ldmatrix<true>(r, address); }

}  // namespace jax_flash::ptx
