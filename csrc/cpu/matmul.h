// Packed panels and the one microkernel: C[M, N] (+)= A[M, K] B[K, N], all float32.
//
// B is packed in panels of kPanel columns, [N / kPanel][K][kPanel]; A and C are row-major with padded rows.
#pragma once

#include "isa.h"
// isa.h goes first: it makes the core force-inlined.
#include "convert.h"
#include "product.h"
#include "rows.h"

namespace jax_flash::JF_ISA {

// to[count, padded(width)] = factor * the n rows at these addresses, then rows of zeros.
static void gather_rows(const char* const* at, int32_t n, int32_t count, const Rows& rows, float factor,
                        float* to) {
  const int32_t ld = padded(rows.width);
  const int32_t bytes = rows.width * static_cast<int32_t>(size_of(rows.dtype));
  // Rows of other heads and pages lie in between, which no hardware prefetcher sees through.
  const int32_t ahead = bytes > 1024 ? 8 : 16;
  for (int32_t r = 0; r < count; ++r, to += ld) {
    if (r + ahead < n && at[r + ahead]) {
      for (int32_t c = 0; c < bytes; c += 64) __builtin_prefetch(at[r + ahead] + c);
    }
    if (r >= n) {
      fill(to, ld, 0.0f);
    } else if (!at[r]) {
      fill(to, ld, rows.missing);
    } else {
      load_row(rows.dtype, at[r], rows.width, factor, to, ld);
    }
  }
}

// to[count, padded(width)] = factor * rows [begin, end), then rows of zeros up to `count`, at most kTileN.
static void load_rows(const Rows& rows, int32_t begin, int32_t end, int32_t count, float factor, float* to) {
  const char* at[kTileN] = {};
  const int32_t n = end > begin ? end - begin : 0;
  rows.find(begin, n, at);
  gather_rows(at, n, count, rows, factor * rows.factor, to);
}

// Row-major rows [n, padded(width)] to panels of the transpose: B[k, j] = rows[j, k], K = width.
// Rows from n up to a multiple of kPanel are zeros. A panel takes padded(width) * kPanel floats.
static void pack_transposed(const float* rows, int32_t n, int32_t width, float* panels) {
  const int32_t ld = padded(width);
  for (int32_t j = 0; j < n; j += kLanes) {
    float* panel = panels + int64_t{j / kPanel} * ld * kPanel + j % kPanel;
    for (int32_t c = 0; c < ld; c += kLanes) {
      Float r[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) r[i] = j + i < n ? load(rows + (j + i) * ld + c) : Float{};
      transpose_step<kLanes / 2>(r, LaneIndices());
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(panel + (c + i) * kPanel, r[i]);
    }
  }
  if (round_up(n, kPanel) - n >= kLanes) {
    float* panel = panels + int64_t{n / kPanel} * ld * kPanel + kLanes;
    for (int32_t c = 0; c < ld; ++c) store(panel + c * kPanel, Float{});
  }
}

// Row-major rows [n, padded(width)] to panels of the same: B[k, c] = rows[k, c], K = n; a panel takes n *
// kPanel floats.
static void pack_columns(const float* rows, int32_t n, int32_t width, float* panels) {
  const int32_t ld = padded(width);
  for (int32_t k = 0; k < n; ++k) {
    for (int32_t c = 0; c < ld; c += kPanel) {
      float* to = panels + (int64_t{c} * n + k * kPanel);
      store(to, load(rows + k * ld + c));
      store(to + kLanes, load(rows + k * ld + c + kLanes));
    }
  }
}

// c[kBlockRows, kPanel] = start + sum_k a(i, k) b[k, :], where start is 0, c or alpha[i] * c.
// a(i, k) is a[i * lda + k], or a[k * lda + i] when transposed; rows of b are kPanel apart when packed, else
// ldb.
template <Start start, bool transposed, bool packed = true>
static __attribute__((noinline)) void multiply_block(const float* a, int64_t lda, const float* b, int64_t ldb,
                                                     int32_t depth, float* c, int64_t ldc,
                                                     const float* alpha) {
  const int64_t step = packed ? kPanel : ldb;
  Float acc[kBlockRows][2];
#pragma GCC unroll 8
  for (int i = 0; i < kBlockRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      acc[i][j] = Float{};
      if constexpr (start == Start::kAccumulate) acc[i][j] = load(c + i * ldc + j * kLanes);
      if constexpr (start == Start::kRescale) acc[i][j] = load(c + i * ldc + j * kLanes) * alpha[i];
    }
  }
  for (int32_t k = 0; k < depth; ++k) {
    const Float b0 = load(b + k * step), b1 = load(b + k * step + kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kBlockRows; ++i) {
      const Float x = broadcast(transposed ? a[k * lda + i] : a[i * lda + k]);
      acc[i][0] += x * b0;
      acc[i][1] += x * b1;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kBlockRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) store(c + i * ldc + j * kLanes, acc[i][j]);
  }
}

// S[i, j] = A_i · B_j over the panels that each row block uses. B is a transposed pack of `width`, S has rows
// of kTileN.
static void multiply_scores(const float* a, const float* panels, int32_t width, const Columns* used,
                            int32_t blocks, int32_t n, float* s) {
  const int32_t ld = padded(width);
  for (int32_t j = 0; j < n; j += kPanel) {
    for (int32_t i = 0; i < blocks; ++i) {
      if (j + kPanel <= used[i].lo || j >= used[i].hi) continue;
      multiply_block<Start::kZero, false>(a + i * kBlockRows * ld, ld, panels + int64_t{j} * ld, kPanel,
                                          width, s + i * kBlockRows * kTileN + j, kTileN, nullptr);
    }
  }
}

// C += P B for row-major P (rows of kTileN); C has rows of padded(width). With alpha, C is multiplied by
// alpha[row] first. B has n rows, packed by columns or as they were loaded.
template <Start start, bool packed = true>
static void multiply_values(const float* p, const float* b, int32_t n, int32_t width, const Columns* used,
                            int32_t blocks, float* c, const float* alpha) {
  const int32_t ld = padded(width);
  const int64_t column = packed ? n : 1, row = packed ? kPanel : ld;  // to the next of b
  for (int32_t j = 0; j < ld; j += kPanel) {
    for (int32_t i = 0; i < blocks; ++i) {
      if (used[i].lo >= used[i].hi) continue;
      const int32_t k = used[i].lo;
      multiply_block<start, false, packed>(p + i * kBlockRows * kTileN + k, kTileN, b + j * column + k * row,
                                           row, used[i].hi - k, c + i * kBlockRows * ld + j, ld,
                                           alpha ? alpha + i * kBlockRows : nullptr);
    }
  }
}

// Sums of the lanes of each of kLanes vectors.
template <int kStep = kLanes / 2, int... lane>
JF_INLINE Float sum_lanes(Float (&x)[kLanes], std::integer_sequence<int, lane...> lanes) {
#pragma GCC unroll 8
  for (int i = 0; i < kStep; ++i) {
    const Float a = x[i], b = x[i + kStep];
    x[i] = __builtin_shufflevector(a, b, (lane & kStep ? kLanes + lane - kStep : lane)...) +
           __builtin_shufflevector(a, b, (lane & kStep ? kLanes + lane : lane + kStep)...);
  }
  if constexpr (kStep > 1) return sum_lanes<kStep / 2>(x, lanes);
  return x[0];
}

// C += Pᵀ B: blocks of keys; used[i] are the rows of P (and of B, packed by columns from n rows) that key
// block i needs.
static void multiply_transposed(const float* p, const float* panels, int32_t n, int32_t width,
                                const Columns* used, int32_t blocks, float* c) {
  const int32_t ld = padded(width);
  for (int32_t j = 0; j < ld; j += kPanel) {
    for (int32_t i = 0; i < blocks; ++i) {
      if (used[i].lo >= used[i].hi) continue;
      const int32_t k = used[i].lo;
      multiply_block<Start::kAccumulate, true>(p + i * kBlockRows + int64_t{k} * kTileN, kTileN,
                                               panels + (int64_t{j} * n + k * kPanel), kPanel, used[i].hi - k,
                                               c + int64_t{i} * kBlockRows * ld + j, ld, nullptr);
    }
  }
}

}  // namespace jax_flash::JF_ISA
