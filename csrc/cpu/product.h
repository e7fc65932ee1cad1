// The matrix products of attention, C[M, N] = start + A[M, K] B[K, N] with float32 accumulation, for an
// element type E (F32 or BF16).
//
// Operands are packed into 32-bit words: one float32, or two bf16 that are adjacent along K, the even one
// in the low half. A is row-major, [M][K / E::kPair] words. B is in panels of kPanel columns, [N /
// kPanel][K / E::kPair][kPanel] words. Rows of every dtype are converted to words while they are packed.
#pragma once

#include "isa.h"
// isa.h goes first: it makes the core force-inlined.
#include "../core/band.h"
#include "convert.h"
#include "rows.h"

namespace jax_flash::JF_ISA {

typedef uint32_t Word __attribute__((may_alias));

JF_INLINE UInt broadcast_word(Word x) { return x - UInt{}; }
JF_INLINE UInt load_words(const Word* p) { return *reinterpret_cast<const UInt*>(p); }
JF_INLINE void store_words(Word* p, UInt x) { *reinterpret_cast<UInt*>(p) = x; }

// float32 operands; rows of 16-bit floats and float8 are widened.
struct F32 {
  static constexpr int kPair = 1;
  static constexpr int kExpDegree = 5;

  JF_INLINE Float multiply_add(Float acc, Word a, UInt b) {
    return acc + broadcast(__builtin_bit_cast(float, a)) * reinterpret_cast<Float>(b);
  }

  // acc + a b, lane by lane.
  JF_INLINE Float multiply_lanes(Float acc, UInt a, UInt b) {
    return acc + reinterpret_cast<Float>(a) * reinterpret_cast<Float>(b);
  }

  // Stores kPanel values to a row of A from column c on, a multiple of kPanel.
  JF_INLINE void store_columns(Word* row, int32_t c, Float x, Float y) {
    store_words(row + c, reinterpret_cast<UInt>(x));
    store_words(row + c + kLanes, reinterpret_cast<UInt>(y));
  }

  // Loads words [c, c + kLanes) of a row, times factor.
  template <DType dtype>
  JF_INLINE UInt load_row(const void* row, int32_t c, float factor) {
    return reinterpret_cast<UInt>(load_vector<dtype>(row, c) * factor);
  }

  // Load columns [c, c + kLanes), or [c, c + kPanel), of one row of words of B. In bf16 a row of words
  // consists of two rows of the operand, an even and an odd one.
  template <DType dtype>
  JF_INLINE UInt load_pair(const void* row, const void*, int32_t c, float factor) {
    return load_row<dtype>(row, c, factor);
  }
  template <DType dtype>
  JF_INLINE void load_panel(const void* row, const void*, int32_t c, float factor, UInt (&words)[2]) {
    words[0] = load_row<dtype>(row, c, factor);
    words[1] = load_row<dtype>(row, c + kLanes, factor);
  }
};

#if defined(__AVX512BF16__)
// Pairs of bf16 as operands of vdpbf16ps. Factors are 1 or -1.
struct BF16 {
  static constexpr int kPair = 2;
  static constexpr int kExpDegree = 4;

  JF_INLINE Float multiply_add(Float acc, Word a, UInt b) {
    return (Float)_mm512_dpbf16_ps((__m512)acc, (__m512bh)broadcast_word(a), (__m512bh)b);
  }

  JF_INLINE Float multiply_lanes(Float acc, UInt a, UInt b) {
    return (Float)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
  }

  JF_INLINE void store_columns(Word* row, int32_t c, Float x, Float y) {
    store_words(row + c / 2, (UInt)_mm512_cvtne2ps_pbh((__m512)y, (__m512)x));
  }

  template <DType dtype>
  JF_INLINE UInt load_row(const void* row, int32_t c, float factor) {
    const UInt x = (UInt)load_elements<dtype>(row, c * kPair);
    return factor < 0 ? x ^ 0x80008000u : x;
  }

  template <DType>
  JF_INLINE UInt load_pair(const void* even, const void* odd, int32_t c, float factor) {
    const UInt x = load_halves(even, c) | load_halves(odd, c) << 16;
    return factor < 0 ? x ^ 0x80008000u : x;
  }

  template <DType dtype>
  JF_INLINE void load_panel(const void* even, const void* odd, int32_t c, float factor, UInt (&words)[2]) {
    const Halves a = load_elements<dtype>(even, c), b = load_elements<dtype>(odd, c);
    words[0] = zip<0>(a, b, std::make_integer_sequence<int, kPanel>());
    words[1] = zip<kLanes>(a, b, std::make_integer_sequence<int, kPanel>());
    if (factor < 0) words[0] ^= 0x80008000u, words[1] ^= 0x80008000u;
  }

 private:
  typedef uint16_t Halves __attribute__((vector_size(kPanel * 2), may_alias));
  typedef Halves HalvesUnaligned __attribute__((aligned(2)));
  typedef uint8_t Quarters __attribute__((vector_size(kPanel), may_alias));
  typedef Quarters QuartersUnaligned __attribute__((aligned(1)));

  // Loads elements [c, c + kPanel) of a row as bf16; float8 is widened, which is exact.
  template <DType dtype>
  JF_INLINE Halves load_elements(const void* row, int32_t c) {
    if constexpr (!is_float8(dtype)) {
      return *reinterpret_cast<const HalvesUnaligned*>(static_cast<const uint16_t*>(row) + c);
    }
    const Quarters stored = *reinterpret_cast<const QuartersUnaligned*>(static_cast<const uint8_t*>(row) + c);
    return widen_float8<dtype>(__builtin_convertvector(stored, Halves));
  }

  // float8 to bf16: the exponent bias is 127 instead of 7 or 15. Zero, denormals, infinity and NaN come from
  // a table, indexed by the low bits.
  template <DType dtype>
  JF_INLINE Halves widen_float8(Halves x) {
    const Halves magnitude = x & 0x7F, sign = (x & 0x80) << 8;
    if constexpr (dtype == DType::kF8E5M2) {
      static constexpr Halves kSpecial = {0, 0x3780, 0x3800, 0x3840, 0, 0, 0,      0,      0,      0,     0,
                                          0, 0,      0,      0,      0, 0, 0,      0,      0,      0,     0,
                                          0, 0,      0,      0,      0, 0, 0x7F80, 0x7FC0, 0x7FC0, 0x7FC0};
      return from_table(magnitude, (magnitude << 5) + 0x3800, magnitude - 4, 0x78, kSpecial) | sign;
    } else {
      static constexpr Halves kSpecial = {
          0, 0x3B00, 0x3B80, 0x3BC0, 0x3C00, 0x3C20, 0x3C40, 0x3C60, 0, 0, 0, 0, 0, 0, 0, 0,
          0, 0,      0,      0,      0,      0,      0,      0,      0, 0, 0, 0, 0, 0, 0, 0x7FC0};
      return from_table(magnitude, (magnitude << 4) + 0x3C00, magnitude - 8, 0x77, kSpecial) | sign;
    }
  }

  // `normal`, but the table's entry where `distance` from the smallest normal number is at least `special`.
  JF_INLINE Halves from_table(Halves index, Halves normal, Halves distance, int16_t special, Halves table) {
    const __mmask32 mask = _mm512_cmpge_epu16_mask((__m512i)distance, _mm512_set1_epi16(special));
    return (Halves)_mm512_mask_permutexvar_epi16((__m512i)normal, mask, (__m512i)index, (__m512i)table);
  }

  template <int begin, int... lane>
  JF_INLINE UInt zip(Halves a, Halves b, std::integer_sequence<int, lane...>) {
    return (UInt)__builtin_shufflevector(a, b, (begin + lane / 2 + lane % 2 * kPanel)...);
  }
};
#endif

inline constexpr int32_t kLineBytes = 64;

// Words of a packed row of `width` features, padded to whole panels.
template <class E>
JF_INLINE int32_t row_words(int32_t width) {
  return padded(width) / E::kPair;
}

// Words along K that hold n elements.
template <class E>
JF_INLINE int32_t depth_words(int32_t n) {
  return (n + E::kPair - 1) / E::kPair;
}

// A copy of a row's bytes from `begin` to its end, padded with zeros to the size of the largest load.
struct alignas(64) RowTail {
  char bytes[kPanel * 4] = {};

  JF_HD RowTail(const char* row, int64_t begin, int64_t end) {
    const int64_t n = end - begin;
    if (n > 0) __builtin_memcpy(bytes, row + begin, n < int64_t{sizeof(bytes)} ? n : sizeof(bytes));
  }
};

// One step of a transpose by recursive halving: exchanges bit `kStep` of the lane index with bit `kStep` of
// the row index.
template <int kStep, class Vector, int... lane>
JF_INLINE void transpose_step(Vector (&r)[kLanes], std::integer_sequence<int, lane...> lanes) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & kStep) continue;
    const Vector a = r[i], b = r[i + kStep];
    r[i] = __builtin_shufflevector(a, b, (lane & kStep ? kLanes + lane - kStep : lane)...);
    r[i + kStep] = __builtin_shufflevector(a, b, (lane & kStep ? kLanes + lane : lane + kStep)...);
  }
  if constexpr (kStep > 1) transpose_step<kStep / 2>(r, lanes);
}

// Reads the rows of one operand as words of E. `at` holds the address of each row, null where it is
// missing.
template <class E, DType dtype>
struct RowReader {
  const char* const* at;
  int32_t width;
  float factor, missing;
  const float* row_factors;  // for float8 pools with a scale per page, else null

  RowReader(const char* const* at_, const Rows& rows, float factor_)
      : at(at_),
        width(rows.width),
        factor(factor_ * rows.factor),
        missing(rows.missing),
        row_factors(rows.row_factors) {}

  static constexpr int32_t kFeatures = kLanes * E::kPair;  // features per vector of words
  static constexpr int64_t kSize = size_of(dtype);
  static constexpr int32_t kAhead = 8;  // rows of prefetch distance

  JF_HD UInt filler() const {
    const UInt x = broadcast_word(__builtin_bit_cast(Word, missing));
    return E::kPair == 1 ? x : (x >> 16) | (x & 0xFFFF0000u);
  }

  JF_HD float factor_of(int32_t j) const {
    if constexpr (is_float8(dtype)) return row_factors ? factor * row_factors[j] : factor;
    return factor;
  }

  // Words [c, c + kLanes) of row j. `whole` states that the row has all of them.
  template <bool whole>
  JF_HD UInt words(int32_t j, int32_t c) const {
    if (!at[j]) return filler();
    if constexpr (whole) return E::template load_row<dtype>(at[j], c, factor_of(j));
    const RowTail tail(at[j], int64_t{c} * E::kPair * kSize, width * kSize);
    return E::template load_row<dtype>(tail.bytes, 0, factor_of(j));
  }

  // Columns [c, c + kPanel) of B's row of words that consists of rows j ... j + kPair - 1. Rows from n on are
  // zeros.
  JF_HD void panel(int32_t j, int32_t n, int32_t c, UInt (&words)[2]) const {
    const char *even = at[j], *odd = E::kPair > 1 && j + 1 < n ? at[j + 1] : nullptr;
    if (even && (odd || E::kPair == 1) && c + kPanel <= width) {
      return E::template load_panel<dtype>(even, odd, c, factor_of(j), words);
    }
    if (!even && !odd) {
      words[0] = words[1] = filler();
      return;
    }
    const int64_t begin = c * kSize, end = width * kSize;
    const RowTail first(even, begin, even ? end : 0), second(odd, begin, odd ? end : 0);
    E::template load_panel<dtype>(first.bytes, second.bytes, 0, factor_of(j), words);
  }

  // Prefetches rows [begin, end): the hardware prefetcher does not follow rows that are far apart.
  JF_HD void fetch(int32_t begin, int32_t end) const {
    for (int32_t j = begin; j < end; ++j) {
      for (int64_t b = 0; b < width * kSize; b += kLineBytes) __builtin_prefetch(at[j] + b);
    }
  }

  // to[count, row_words(width)] = the n rows, then rows of zeros; the row stride of `to` is to_row words.
  JF_HD void rows(int32_t n, int32_t count, Word* to, int32_t to_row) const {
    const int32_t ld = row_words<E>(width), whole = width / kFeatures * kLanes;
    for (int32_t j = 0; j < count; ++j, to += to_row) {
      if (j < n) fetch(j + kAhead, min(j + kAhead + 1, n));
      int32_t c = j < n ? 0 : ld;
      for (; c < whole; c += kLanes) store_words(to + c, words<true>(j, c));
      for (; c < ld; c += kLanes) store_words(to + c, words<false>(j, c));
      if (j >= n) {
        for (c = 0; c < ld; c += kLanes) store_words(to + c, UInt{});
      }
    }
  }

  template <bool whole>
  JF_HD void transpose_block(int32_t j, int32_t n, int32_t c, Word* to) const {
    UInt r[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) r[i] = j + i < n ? words<whole>(j + i, c) : UInt{};
    transpose_step<kLanes / 2>(r, LaneIndices());
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) store_words(to + i * kPanel, r[i]);
  }

  JF_HD void transposed(int32_t n, Word* panels, int64_t distance) const {
    const int32_t ld = row_words<E>(width), whole = width / kFeatures * kLanes;
    for (int32_t j = 0; j < round_up(n, kPanel); j += kLanes) {
      fetch(j + kLanes, min(j + 2 * kLanes, n));
      Word* panel = panels + j / kPanel * distance + j % kPanel;
      int32_t c = 0;
      for (; c < whole; c += kLanes) transpose_block<true>(j, n, c, panel + c * kPanel);
      for (; c < ld; c += kLanes) transpose_block<false>(j, n, c, panel + c * kPanel);
    }
  }

  JF_HD void columns(int32_t n, Word* panels) const {
    const int32_t depth = depth_words<E>(n);
    for (int32_t k = 0; k < depth; ++k) {
      fetch(k * E::kPair + kAhead, min((k + 1) * E::kPair + kAhead, n));
      for (int32_t c = 0; c < padded(width); c += kPanel) {
        UInt words[2];
        panel(k * E::kPair, n, c, words);
        Word* to = panels + (int64_t{c} * depth + k * kPanel);
        store_words(to, words[0]);
        store_words(to + kLanes, words[1]);
      }
    }
  }
};

// Calls use(reader) with the RowReader for the dtype of the rows.
template <class E, class Use>
JF_INLINE void with_reader(const char* const* at, const Rows& rows, float factor, Use use) {
  if constexpr (E::kPair == 2) {
    use(RowReader<E, DType::kBF16>(at, rows, factor));
  } else {
    switch (rows.dtype) {
      case DType::kF16:
        return use(RowReader<E, DType::kF16>(at, rows, factor));
      case DType::kBF16:
        return use(RowReader<E, DType::kBF16>(at, rows, factor));
      case DType::kF32:
        return use(RowReader<E, DType::kF32>(at, rows, factor));
      case DType::kF8E4M3:
        return use(RowReader<E, DType::kF8E4M3>(at, rows, factor));
      case DType::kF8E5M2:
        return use(RowReader<E, DType::kF8E5M2>(at, rows, factor));
    }
  }
}

// Packs operand A: to[count, row_words(width)] = factor * the n rows at these addresses, then rows of zeros;
// the row stride of `to` is ld words.
template <class E>
static void pack_rows(const char* const* at, int32_t n, int32_t count, const Rows& rows, float factor,
                      Word* to, int32_t ld) {
  with_reader<E>(at, rows, factor, [&](const auto& reader) { reader.rows(n, count, to, ld); });
}

// Words of a panel of a transposed operand.
template <class E>
JF_INLINE int64_t panel_words(int32_t width) {
  return int64_t{row_words<E>(width)} * kPanel;
}

// Packs operand B with K = width: B[k, j] = feature k of row j, in panels of panel_words(width) with a stride
// of `distance` words. Rows from n up to a multiple of kPanel are zeros.
template <class E>
static void pack_transposed(const char* const* at, int32_t n, const Rows& rows, Word* panels,
                            int64_t distance) {
  with_reader<E>(at, rows, 1.0f, [&](const auto& reader) { reader.transposed(n, panels, distance); });
}

// Packs operand B with K = n: B[k, c] = feature c of row k, in panels of depth_words(n) * kPanel words.
template <class E>
static void pack_columns(const char* const* at, int32_t n, const Rows& rows, Word* panels) {
  with_reader<E>(at, rows, 1.0f, [&](const auto& reader) { reader.columns(n, panels); });
}

enum class Start { kZero, kAccumulate, kRescale };

// Per-row inputs and outputs of a block of C.
struct BlockRows {
  const float* alpha = nullptr;  // kRescale: C[i] starts from alpha[i] C[i]
  Float* lane_max = nullptr;     // lane_max[i] = max(lane_max[i], C[i]), lane by lane
};

// The microkernel: C[kBlockRows, kPanel] = start + sum over `depth` words k of a(i, k) b[k, :], where a(i,
// k) is a[i * lda + k], or a[k * lda + i] if `transposed`. The row stride of b is ldb, in a panel kPanel.
template <class E, Start start, bool transposed = false, bool tracks_max = false>
static __attribute__((noinline)) void multiply_words(const Word* a, int64_t lda, const Word* b, int32_t depth,
                                                     float* c, int64_t ldc, BlockRows rows,
                                                     int64_t ldb = kPanel) {
  Float acc[kBlockRows][2];
#pragma GCC unroll 8
  for (int i = 0; i < kBlockRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      acc[i][j] = Float{};
      if constexpr (start == Start::kAccumulate) acc[i][j] = load(c + i * ldc + j * kLanes);
      if constexpr (start == Start::kRescale) acc[i][j] = load(c + i * ldc + j * kLanes) * rows.alpha[i];
    }
  }
  for (int32_t k = 0; k < depth; ++k) {
    const Word* row = b + k * (transposed ? ldb : kPanel);
    const UInt b0 = load_words(row), b1 = load_words(row + kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kBlockRows; ++i) {
      const Word x = transposed ? a[k * lda + i] : a[i * lda + k];
      acc[i][0] = E::multiply_add(acc[i][0], x, b0);
      acc[i][1] = E::multiply_add(acc[i][1], x, b1);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kBlockRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) store(c + i * ldc + j * kLanes, acc[i][j]);
    if constexpr (tracks_max) rows.lane_max[i] = max(acc[i][0], max(acc[i][1], rows.lane_max[i]));
  }
}

using Columns = Interval;  // of a tile

inline constexpr int kMaxBlocks = kTileM / kBlockRows;

inline constexpr uint64_t kAllPanels = ~uint64_t{0};  // a bit for each panel of a tile

}  // namespace jax_flash::JF_ISA
