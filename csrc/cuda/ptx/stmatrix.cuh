// stmatrix (sm_90 and newer): stores four 8 × 8 matrices of 16-bit elements in mma's fragment layout to
// shared memory. Lane l gives the address of row l % 8 of matrix l / 8, as for ldmatrix.
#pragma once

#include <cstdint>

namespace jax_flash::ptx {

__device__ __forceinline__ void stmatrix_x4(uint32_t address, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r[0]),
               "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

}  // namespace jax_flash::ptx
