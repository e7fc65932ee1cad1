// Score options of one row of S, a vector of columns at a time. Bias, mask and segment ids are read within
// the visible columns only.
#pragma once

#include "isa.h"
// isa.h goes first: it makes the core force-inlined.
#include "head.h"

namespace jax_flash::JF_ISA {

JF_INLINE Int load_bytes(const void* row) {
#if defined(__AVX512F__)
  return (Int)_mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(row)));
#elif defined(__AVX2__)
  return (Int)_mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(row)));
#else
  Int x;
  for (int lane = 0; lane < kLanes; ++lane) x[lane] = static_cast<const uint8_t*>(row)[lane];
  return x;
#endif
}

// kLanes elements of `size` bytes from column c on; `row` is the address of column 0. If the vector crosses
// an edge of `visible` (not `inner`), elements outside are set to zero and not read.
template <bool inner, int size>
struct ColumnVector {
  alignas(64) char edge[inner ? 1 : kLanes * size];
  const char* data;

  JF_HD ColumnVector(const void* row, int32_t c, Columns visible) {
    data = static_cast<const char*>(row) + int64_t{c} * size;
    if constexpr (!inner) {
      const int32_t lo = max(visible.lo - c, 0), hi = min(visible.hi - c, kLanes);
      __builtin_memset(edge, 0, sizeof(edge));
      if (lo < hi) __builtin_memcpy(edge + lo * size, data + lo * size, (hi - lo) * size);
      data = edge;
    }
  }
};

// Columns [c, c + kLanes) of a row of bias, as ColumnVector reads them.
template <bool inner>
JF_INLINE Float load_bias(DType dtype, const void* row, int32_t c, Columns visible) {
  if (dtype == DType::kF32) return load_vector<DType::kF32>(ColumnVector<inner, 4>(row, c, visible).data, 0);
  const ColumnVector<inner, 2> half(row, c, visible);
  return dtype == DType::kF16 ? load_vector<DType::kF16>(half.data, 0)
                              : load_vector<DType::kBF16>(half.data, 0);
}

// The address of an element of a score operand.
JF_INLINE const char* element(const Head& head, const View& view, int64_t offset, int64_t size) {
  return view.as<const char>() + (view.leading_offset(head.problem.leading, head.leading) + offset) * size;
}

// Element (row, j0) of a bias whose only column applies to all columns.
JF_INLINE float shared_bias(DType dtype, const char* at) {
  alignas(64) float one[kLanes];
  load_row(dtype, at, 1, 1.0f, one, kLanes);
  return one[0];
}

// Score options as bits. The loop over a row is instantiated once for each single option, and once with
// run-time tests for combinations.
enum ScoreOption {
  kSoftcap = 1,
  kAlibi = 2,
  kBias = 4,
  kConstant = 8,
  kMask = 16,
  kSegments = 32,
  kMaskFrom = 64,  // a mask whose column 0 is past the tile's
  kHole = 128,
  kBlocks = 256,
  kAnyOptions = 511
};

// The score options of one row; pointers point to column 0. The final score is that of core/score.h for a
// whole vector: s = softcap(scale S, cap) + bias + alibi(slope, c(i), j), or with bias_first softcap(scale S
// + bias, cap) + alibi(slope, c(i), j); -inf where masked.
struct ScoreRow {
  static constexpr int kPrefetchRows = 2;

  int options = 0;
  float scale, cap;
  float argument;  // factor of S, or of S + bias, in the argument of tanh, times 2 log2(e) for tanh_fast
  bool bias_first;
  bool exact_tanh;
  DType bias_dtype;
  const char* bias = nullptr;
  int64_t bias_ahead = 0, mask_ahead = 0;  // byte distance to the row that is prefetched
  float constant = 0.0f;  // a bias that all columns share; -inf if a mask of one column hides them
  float slope = 0.0f, distance = 0.0f;
  const uint8_t* mask = nullptr;
  const int32_t* ids = nullptr;
  int32_t id = 0;
  int32_t first_masked = 0;              // the first column that the mask has
  Columns hole{0, 0};                    // keys between the row's two ranges
  BlockMask blocks;                      // the blocks of the row's head
  int32_t block_row = 0, first_key = 0;  // first_key: the key of column 0

  // Without `mixed`, segments, masks and holes hide nothing.
  ScoreRow(const Head& head, Row row, int32_t j0, bool mixed) {
    const Problem& p = head.problem;
    const int32_t sequence = head.sequence.index, i = row.position;
    scale = head.has_options ? __builtin_fabsf(p.spec.scale) : 1.0f;
    cap = p.spec.softcap;
    if (cap > 0) options |= kSoftcap;
    exact_tanh = p.dtype == DType::kF32 || cap > kMaxCoarseSoftcap;
    bias_dtype = p.bias_dtype;
    if (p.bias) {
      const int64_t size = size_of(p.bias_dtype);
      const char* at = element(head, p.bias, p.bias.offset(sequence, row.head, i, j0), size);
      if (p.bias.column) {
        bias = at;
        bias_ahead = kPrefetchRows * p.bias.row * size;
        options |= kBias;
      } else {
        constant = shared_bias(p.bias_dtype, at);
      }
    }
    if (p.alibi_slopes) {
      slope = head.at(p.alibi_slopes, p.alibi_slopes.offset(sequence, row.head, 0));
      options |= kAlibi;
      distance = static_cast<float>(head.band.diagonal(i) - j0);
    }
    if (head.mask && mixed) {
      mask = head.mask.at(row.head - head.head, i, j0);
      first_masked = head.mask.first - j0;
      if (head.mask.column) {
        mask_ahead = kPrefetchRows * head.mask.row;
        options |= first_masked > 0 ? kMaskFrom : kMask;
      } else if (!*mask) {
        constant = kNegInf;
      }
    }
    if (p.q_segment_ids && mixed) {
      const View &q = p.q_segment_ids, &k = p.kv_segment_ids;
      id = *reinterpret_cast<const int32_t*>(element(head, q, q.offset(sequence, 0, i), 4));
      options |= kSegments;
      ids = reinterpret_cast<const int32_t*>(element(head, k, k.offset(sequence, 0, j0), 4));
    }
    if (head.ranges.two && mixed) {
      const Interval keys = head.seen(row, {0, head.band.k_len}).hole;
      hole = {keys.lo - j0, keys.hi - j0};
      if (!hole.empty()) options |= kHole;
    }
    if (head.blocks && mixed) {
      blocks = head.blocks;
      blocks.seen += (row.head - head.head) * blocks.head;
      block_row = (i + blocks.first_row) / blocks.block_rows, first_key = j0 + blocks.first_key;
      options |= kBlocks;
    }
    if (constant != 0.0f) options |= kConstant;
    bias_first = p.spec.bias_first && (options & (kBias | kConstant));
    argument = cap > 0 ? (bias_first ? 1.0f : scale) / cap * (exact_tanh ? 1.0f : 2.0f * kLog2e) : 0.0f;
  }

  template <int kOptions, ScoreOption option>
  JF_HD bool has() const {
    if constexpr (kOptions == kAnyOptions) return (options & option) != 0;
    return (kOptions & option) != 0;
  }

  // The final scores of columns [c, c + kLanes).
  template <int kOptions, bool inner>
  JF_HD Float finish(Float s, int32_t c, Columns visible, float* slopes) const {
    Float x = s * scale;
    const bool first = kOptions == kAnyOptions && bias_first;
    if (first) x = add_biases<kOptions, inner>(x, c, visible);
    if (has<kOptions, kSoftcap>()) {
      const Float argument_of_tanh = (first ? x : s) * argument;
      Float t = exact_tanh ? tanh(argument_of_tanh) : tanh_fast(argument_of_tanh);
      const Int hidden = x == kNegInf;
      if (first) t = hidden ? broadcast(-1.0f) : t;  // the slope of tanh is 0 at −1
      if (slopes) store(slopes + c, 1.0f - t * t);
      const Float capped = t * cap;
      x = first ? (hidden ? x : capped) : capped;
    }
    const Int column = lane_indices() + c;
    if (has<kOptions, kAlibi>()) {
      const Float d = distance - __builtin_convertvector(column, Float);
      x -= slope * (d < 0.0f ? -d : d);
    }
    if (!first) x = add_biases<kOptions, inner>(x, c, visible);
    if (has<kOptions, kMask>()) {
      __builtin_prefetch(mask + mask_ahead + c);
      const ColumnVector<inner, 1> flags(mask, c, visible);
      x = load_bytes(flags.data) != 0 ? x : broadcast(kNegInf);
    }
    if (has<kOptions, kMaskFrom>()) {
      const Columns masked{max(visible.lo, first_masked), visible.hi};
      const ColumnVector<false, 1> flags(mask, c, masked);
      x = (load_bytes(flags.data) != 0) | (column < first_masked) ? x : broadcast(kNegInf);
    }
    if (has<kOptions, kSegments>()) {
      const ColumnVector<inner, 4> keys(ids, c, visible);
      x = reinterpret_cast<Int>(static_cast<UInt>(*reinterpret_cast<const UIntUnaligned*>(keys.data))) == id
              ? x
              : broadcast(kNegInf);
    }
    if (has<kOptions, kHole>()) x = (column < hole.lo) | (column >= hole.hi) ? x : broadcast(kNegInf);
    if (has<kOptions, kBlocks>() && blocks.block_keys == 1) {
      const int32_t end = block_row < blocks.rows ? blocks.columns - first_key : 0;
      const uint8_t* const row = blocks.seen + block_row * blocks.row + first_key;
      const ColumnVector<false, 1> flags(row, c, {visible.lo, min(visible.hi, end)});
      x = load_bytes(flags.data) != 0 ? x : broadcast(kNegInf);
    } else if (has<kOptions, kBlocks>()) {
      // A block is at least as wide as a vector, so a vector overlaps at most two blocks.
      const int32_t j = first_key + c, block = j / blocks.block_keys;
      const int32_t next = (block + 1) * blocks.block_keys - j;
      const Int seen = lane_indices() < next ? Int{} + blocks.sees_block(0, block_row, block)
                                             : Int{} + blocks.sees_block(0, block_row, block + 1);
      x = seen != 0 ? x : broadcast(kNegInf);
    }
    if constexpr (!inner) x = (column >= visible.lo) & (column < visible.hi) ? x : broadcast(kNegInf);
    return x;
  }

 private:
  template <int kOptions, bool inner>
  JF_HD Float add_biases(Float x, int32_t c, Columns visible) const {
    if (has<kOptions, kBias>()) {
      __builtin_prefetch(bias + bias_ahead + c * size_of(bias_dtype));
      x = add(x, load_bias<inner>(bias_dtype, bias, c, visible));
    }
    if (has<kOptions, kConstant>()) x = add(x, broadcast(constant));
    return x;
  }
  // A bias of −inf hides any score, NaN and +inf included.
  JF_HD static Float add(Float x, Float bias) { return bias == kNegInf ? bias : x + bias; }
};

template <int kOptions, bool inner>
JF_INLINE Float finish_columns(const ScoreRow& row, Columns visible, int32_t begin, int32_t end, float* s,
                               float* slopes, Float lane_max) {
  const ScoreRow own = row;  // a local copy stays in registers; stores to S might alias the original
  for (int32_t c = begin; c < end; c += kLanes) {
    const Float x = own.finish<kOptions, inner>(load(s + c), c, visible, slopes);
    store(s + c, x);
    lane_max = max(x, lane_max);
  }
  return lane_max;
}

// Calls use(inner, begin, end) for the vectors that overlap `visible`: separately for each that crosses an
// edge (inner is false), and once for all those within.
template <class Use>
JF_INLINE void with_edges(Columns visible, Use use) {
  const Columns whole = vectors(visible);
  Columns inner{round_up(visible.lo, kLanes), round_down(visible.hi, kLanes)};
  if (inner.empty()) inner = {whole.hi, whole.hi};
  use(std::false_type(), whole.lo, inner.lo);
  use(std::true_type(), inner.lo, inner.hi);
  use(std::false_type(), inner.hi, whole.hi);
}

template <int kOptions>
static Float finish_row(const ScoreRow& row, Columns visible, float* s, float* slopes) {
  Float lane_max = broadcast(kNegInf);
  with_edges(visible, [&](auto inner, int32_t begin, int32_t end) {
    lane_max = finish_columns<kOptions, inner.value>(row, visible, begin, end, s, slopes, lane_max);
  });
  return lane_max;
}

// Not inlined: within the callers' loops over runs of panels its loop took half as long again, which cost a
// forward with ALiBi 4%.
__attribute__((noinline)) inline Float Head::finish_scores(Row row, int32_t j0, Columns visible, bool mixed,
                                                           float* s, float* slopes) const {
  const ScoreRow options(*this, row, j0, mixed);
  switch (options.options) {
    case 0:
      return finish_row<0>(options, visible, s, slopes);
    case kSoftcap:
      return finish_row<kSoftcap>(options, visible, s, slopes);
    case kAlibi:
      return finish_row<kAlibi>(options, visible, s, slopes);
    case kBias:
      return finish_row<kBias>(options, visible, s, slopes);
    case kMask:
      return finish_row<kMask>(options, visible, s, slopes);
    case kSegments:
      return finish_row<kSegments>(options, visible, s, slopes);
    case kMaskFrom:
      return finish_row<kMaskFrom>(options, visible, s, slopes);
    case kHole:
      return finish_row<kHole>(options, visible, s, slopes);
    case kBlocks:
      return finish_row<kBlocks>(options, visible, s, slopes);
    default:
      return finish_row<kAnyOptions>(options, visible, s, slopes);
  }
}

inline void Head::bias_tangent_row(const View& tbias, Row row, int32_t j0, Columns visible, float* to) const {
  const DType dtype = problem.bias_dtype;
  const int64_t offset = tbias.offset(sequence.index, row.head, row.position, j0);
  const char* at = element(*this, tbias, offset, size_of(dtype));
  if (!tbias.column) {
    const Columns whole = vectors(visible);
    return fill(to + whole.lo, whole.hi - whole.lo, shared_bias(dtype, at));
  }
  with_edges(visible, [&](auto inner, int32_t begin, int32_t end) {
    for (int32_t c = begin; c < end; c += kLanes) {
      store(to + c, load_bias<inner.value>(dtype, at, c, visible));
    }
  });
}

}  // namespace jax_flash::JF_ISA
