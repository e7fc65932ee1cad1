#pragma once
#include <algorithm>
#include "core/plan/row.h"
namespace jax_flash {
inline constexpr int64_t kBlockStateBytes = 512;
inline constexpr int64_t kDecodeTargetBytes = 24;
}  // namespace jax_flash
namespace jax_flash::portable {
inline int64_t shared_elements(const KernelRow& row) {
  const int64_t both = row.head_dim + row.value_dim, larger = std::max(row.head_dim, row.value_dim);
  const int64_t m = row.block_m, n = row.block_n, staged = row.stages == 0 ? larger : row.stages * both;
  switch (row.pass) {
    case Pass::kForward:
      return m * row.head_dim + n * staged;
    case Pass::kDecode:  // `stages` tiles of K and of V
      return n * staged;
    case Pass::kBackward:  // K and V, `stages` tiles of Q and of dO, P and dS
      return n * both + m * staged + 2 * m * n;
    case Pass::kBiasGradient:  // Q and K, dO and V
      return (m + n) * staged;
  }
  return 0;
}
inline int64_t shared_bytes(const KernelRow& row, Loader loader, DType dtype) {
  int64_t others = kBlockStateBytes;
  if (row.pass == Pass::kBackward)
    others += std::max(row.stages, 1) * int64_t{row.block_m} * 8;  // lse and delta of rows
  if (row.pass == Pass::kForward && loader == Loader::kPaged)
    others += (row.stages + int64_t{1}) * row.block_n * 16;  // where keys lie
  if (row.pass == Pass::kDecode) {  // O, a few columns at a time, and the softmax of each warp
    const int64_t columns = row.block_m == 8 && row.value_dim % 64 == 0 ? 64 : 32;
    others += int64_t{row.warps} * row.block_m * (4 * (columns + 4) + 8);
  }
  return shared_elements(row) * (dtype == DType::kF32 ? 4 : 2) + others;
}
}  // namespace jax_flash::portable
