// Decode of at most kDecodeRows rows per KV head: keys and values are read once, in memory order.
#pragma once

#include "hidden.h"
#include "product.h"
#include "softmax.h"

namespace jax_flash::JF_ISA {

inline constexpr int32_t kDecodeKeys = 64;        // keys of a tile
inline constexpr int32_t kStepKeys = 2;           // keys per microkernel call; at all heads they fit into L1
inline constexpr int32_t kAheadBytes = 12 << 10;  // distance of the prefetch of every cache line
inline constexpr int32_t kPageAheadBytes = 80 << 10;  // distance of the prefetch of one line per memory page
inline constexpr int32_t kPageBytes = 4 << 10;
// Up to this stride between heads, in head widths, a key's heads are prefetched as one range.
inline constexpr int32_t kMostApart = 4;
static_assert(kDecodeKeys % kLanes == 0);

// Lane i of the result is the sum of the lanes of x[i].
template <int kStep = kLanes / 2, int... lane>
JF_INLINE Float sum_lanes(Float (&x)[kLanes], std::integer_sequence<int, lane...> lanes) {
#pragma GCC unroll 8
  for (int i = 0; i < kStep; ++i) {
    const Float a = x[i], b = x[i + kStep];
    x[i] = __builtin_shufflevector(a, b, (lane & kStep ? kLanes + lane : lane)...) +
           __builtin_shufflevector(a, b, (lane & kStep ? kLanes + lane - kStep : lane + kStep)...);
  }
  if constexpr (kStep > 1) return sum_lanes<kStep / 2>(x, lanes);
  return x[0];
}

// S[g][0, 2) = factor q[g] · k[0, 2) for kRows query rows. Even lanes of `factor` belong to the first key.
template <class E, DType dtype, int kRows>
JF_INLINE void score_step(const char* const* at, Float factor, const Word* q, int32_t width, float* s) {
  const char* const k[kStepKeys] = {at[0], at[1]};
  const int32_t ld = row_words<E>(width);
  Float sums[kLanes] = {};
  for (int32_t c = 0; c < width / E::kPair; c += kLanes) {
    UInt key[kStepKeys];
#pragma GCC unroll 8
    for (int i = 0; i < kStepKeys; ++i) key[i] = E::template load_row<dtype>(k[i], c, 1.0f);
#pragma GCC unroll 8
    for (int g = 0; g < kRows; ++g) {
      const UInt x = load_words(q + g * ld + c);
#pragma GCC unroll 8
      for (int i = 0; i < kStepKeys; ++i)
        sums[g * kStepKeys + i] = E::multiply_lanes(sums[g * kStepKeys + i], x, key[i]);
    }
  }
  alignas(64) float all[kLanes];
  store(all, sum_lanes(sums, LaneIndices()) * factor);
#pragma GCC unroll 8
  for (int g = 0; g < kRows; ++g) __builtin_memcpy(s + g * kDecodeKeys, all + g * kStepKeys, kStepKeys * 4);
}

// o[g] += p[g][0, 2) v[0, 2)
template <class E, DType dtype, int kRows>
JF_INLINE void value_step(const char* const* at, const Word* p, int32_t width, float* o) {
  constexpr int kWords = kStepKeys / E::kPair, kVectors = E::kPair;  // pairs load as panels
  const char* const v[kStepKeys] = {at[0], at[1]};
  const int32_t ld = padded(width);
  UInt weight[kRows * kWords];
#pragma GCC unroll 16
  for (int i = 0; i < kRows * kWords; ++i) {
    weight[i] = broadcast_word(p[i / kWords * kDecodeKeys + i % kWords]);
  }
  for (int32_t c = 0; c < width; c += kVectors * kLanes) {
    UInt value[kStepKeys];  // [kWords, kVectors]
    if constexpr (E::kPair == 1) {
      for (int i = 0; i < kStepKeys; ++i) value[i] = E::template load_row<dtype>(v[i], c, 1.0f);
    } else {
      E::template load_panel<dtype>(v[0], v[1], c, 1.0f, value);
    }
#pragma GCC unroll 8
    for (int g = 0; g < kRows; ++g) {
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) {
        float* to = o + g * ld + c + j * kLanes;
        Float x = load(to);
#pragma GCC unroll 2
        for (int i = 0; i < kWords; ++i) {
          x = E::multiply_lanes(x, weight[g * kWords + i], value[i * kVectors + j]);
        }
        store(to, x);
      }
    }
  }
}

enum class Step { kScores, kValues };

// A step for all query rows of one KV head (kStepKeys · kRows = kLanes sums); x is q or P, and y is S or O.
template <class E, Step step, DType dtype, int kRows = kLanes / kStepKeys>
JF_INLINE void rows_step(const char* const* at, Float factor, int32_t rows, const Word* x, int32_t width,
                         float* y) {
  const int32_t x_ld = step == Step::kScores ? row_words<E>(width) : kDecodeKeys;
  const int32_t y_ld = step == Step::kScores ? kDecodeKeys : padded(width);
  for (; rows >= kRows; rows -= kRows, x += kRows * x_ld, y += kRows * y_ld) {
    if constexpr (step == Step::kScores) {
      score_step<E, dtype, kRows>(at, factor, x, width, y);
    } else {
      value_step<E, dtype, kRows>(at, x, width, y);
    }
  }
  if constexpr (kRows > 1) {
    if (rows > 0) rows_step<E, step, dtype, kRows - 1>(at, factor, rows, x, width, y);
  }
}

// The keys or values of all KV heads of a tile, read in memory order.
struct DecodeStream {
  Rows rows;  // at the first KV head
  int64_t head_bytes;
  int32_t heads, ahead, page_ahead;  // ahead, page_ahead: prefetch distances in keys
  int32_t key_bytes, key_lines;      // of one key, from its first head to its last
  const char* missing;               // the row that replaces a key on a page outside the pool
  const char* at[3 * kDecodeKeys];   // addresses of the next keys of the sequence
  int32_t addressed;                 // how many of `at` are set

  DecodeStream(const Rows& first, int64_t stride, int32_t count, const char* row)
      : rows(first), heads(count), missing(row) {
    head_bytes = stride * size_of(rows.dtype);
    const int64_t own = rows.width * size_of(rows.dtype);
    const bool apart = head_bytes > kMostApart * own;  // a page stores one head after the other
    key_bytes = static_cast<int32_t>((count - 1) * (apart ? own : head_bytes) + own);
    key_lines = (key_bytes + kLineBytes - 1) / kLineBytes;
    ahead = max(kStepKeys, min(kAheadBytes / key_bytes, kDecodeKeys));
    page_ahead = min(kPageAheadBytes / key_bytes, kDecodeKeys);
  }

  void start(int32_t j0, int32_t end) {
    addressed = min(end - j0, kDecodeKeys + ahead + page_ahead);
    rows.addresses(j0, addressed, at);
  }

  // Prefetches one line of each memory page that begins at or within this key. The first access to a page
  // waits for its address translation, and the hardware prefetcher starts on the page only after it.
  JF_HD void prefetch_pages(int32_t key) const {
    if (key >= addressed || !at[key]) return;
    if (reinterpret_cast<uintptr_t>(at[key]) % kPageBytes >= static_cast<uint32_t>(key_bytes)) return;
    for (int32_t b = 0; b < key_bytes; b += kPageBytes) __builtin_prefetch(at[key] + b, 0, 2);
  }

  // Addresses of keys r and r + 1 of the tile's n at KV head x; rows of zeros from key n on.
  JF_HD void addresses(int32_t r, int32_t n, int32_t x, const char** to) const {
    alignas(64) static constexpr char kZeros[kMaxLatentDim * 4] = {};
#pragma GCC unroll 8
    for (int32_t i = 0; i < kStepKeys; ++i) {
      to[i] = r + i >= n ? kZeros : at[r + i] ? at[r + i] + x * head_bytes : missing;
    }
  }
};

// The position of a stream's software prefetch.
struct Prefetcher {
  const DecodeStream& stream;
  int32_t key;  // the key that is prefetched next
  int32_t end;
  int32_t left = 0;
  const char* next = nullptr;

  JF_HD void run(int32_t lines) {
    while (lines > 0) {
      if (left == 0) {
        if (key >= end) return;
        stream.prefetch_pages(key + stream.page_ahead);
        next = stream.at[key++];
        left = stream.key_lines;
      }
      const int32_t n = min(lines, left);
      lines -= n;
      left -= n;
      if (!next) continue;
      const char* const end = next + n * kLineBytes;
      for (; next + 4 * kLineBytes <= end; next += 4 * kLineBytes) {
        __builtin_prefetch(next);
        __builtin_prefetch(next + kLineBytes);
        __builtin_prefetch(next + 2 * kLineBytes);
        __builtin_prefetch(next + 3 * kLineBytes);
      }
      for (; next < end; next += kLineBytes) __builtin_prefetch(next);
    }
  }
};

// The rows that replace those of a page outside the pool. Keys have all bits set, which is NaN in every
// dtype. Values are 0, so that only the score is NaN.
struct MissingRows {
  char key[kMaxLatentDim * 4], value[kMaxLatentDim * 4];

  constexpr MissingRows() : key(), value() {
    for (char& c : key) c = '\xFF';
  }
};
alignas(64) inline constexpr MissingRows kMissingRows;

// Attention of a few query positions at consecutive query heads. Rows have the order of RowTile, so those of
// one position and KV head are adjacent.
template <class E>
class DecodeLoop {
 public:
  DecodeLoop(const Problem& p, const RowTile* tile, int32_t, float* memory)
      : problem_(p), head_(p, tile->leading, tile->sequence, tile->head), tile_(*tile), rows_(tile->rows()) {
    group_ = p.heads / p.kv_heads;
    Scratch scratch{memory};
    q_ = reinterpret_cast<Word*>(scratch.take(kTileM * row_words<E>(p.head_dim)));
    s_ = scratch.take(kTileM * kDecodeKeys);
    o_ = scratch.take(kTileM * padded(p.value_dim));
    factors_ = scratch.take(kTileM * kDecodeKeys);
    const char* at[kTileM] = {};
    query_addresses(head_, tile_, head_.query, head_.problem.query.head, at);
    pack_rows<E>(at, rows_, rows_, head_.query, head_.query_sign, q_, row_words<E>(p.head_dim));
  }

  Interval visible() const { return head_.seen_by_any({tile_.begin, tile_.end, tile_.heads}); }

  // Computes the softmax state and O over keys [keys.lo, keys.hi).
  void attend(Interval keys) {
    attend_once(keys, false);
    if (has_nan(o_, rows_ * padded(problem_.value_dim))) attend_once(keys, true);
  }

  const Head& head() const { return head_; }
  float* o(int32_t = 0) { return o_; }
  Softmax& state(int32_t = 0) { return state_; }

 private:
  // separate_non_finite: keys that are not finite are added one by one (hidden.h).
  void attend_once(Interval keys, bool separate_non_finite) {
    const Problem& p = problem_;
    const auto values_at = [&](int32_t x) { return values_of(x); };
    non_finite_.count = 0;
    state_.reset();
    fill(o_, rows_ * padded(p.value_dim), 0.0f);
    const int32_t kv_heads = tile_.heads / group_;
    DecodeStream key(head_.key, p.key.head, kv_heads, kMissingRows.key);
    DecodeStream value(head_.value, p.value.head, kv_heads, kMissingRows.value);
    bool cold = true;  // no earlier tile has prefetched these keys
    for (int32_t j0 = keys.lo; j0 < keys.hi; j0 += kDecodeKeys) {
      const KeyRange range{intersect(keys, {j0, j0 + kDecodeKeys}), j0};
      const int32_t n = range.keys.size();
      const SeenByRows seen = head_.seen(QueryRange{tile_.begin, tile_.end, tile_.heads}, range.keys);
      const SeenPanels panels = seen_panels(head_, {tile_.begin, tile_.end, tile_.heads}, {0, n}, j0);
      if (seen.any.empty() || panels.hull({0, n}).empty()) {
        cold = true;
        continue;
      }
      key.start(j0, keys.hi);
      load_factors(head_.key, p.k_scale, j0, n);
      multiply<Step::kScores>(key, cold, n);  // S = Q Kᵀ
      BlockColumns block{.used = {0, n}};
      const bool others = p.q_segment_ids || seen.holes;
      if (others || panels.hides_some({0, n})) block.mixed = kAllPanels;
      SoftmaxShift shifts;
      const auto row = [&](int32_t r) { return Row{tile_.position(r), tile_.head_of(r)}; };
      for (int32_t r = 0; r < rows_; ++r) {
        softmax_maximum(head_, row(r), range, block, s_ + r * kDecodeKeys, broadcast(kNegInf), state_, shifts,
                        r);
      }
      softmax_rescale<E>(rows_, shifts, state_);
      load_factors(head_.value, p.v_scale, j0, n);
      value.start(j0, keys.hi);
      if (separate_non_finite) non_finite_.find(kv_heads, values_at, j0, n, value.at);
      for (int32_t k = 0; head_.value.page_factors && k < non_finite_.count; ++k) {
        for (int32_t x = 0; x < kv_heads; ++x) factors_of(x)[non_finite_.column[k]] = 1.0f;
      }
      for (int32_t r = 0; r < rows_; ++r) {
        const float* const weights = head_.value.page_factors ? factors_of(kv_head_of(r)) : nullptr;
        softmax_row<E>(head_, row(r), j0, block, s_ + r * kDecodeKeys, shifts.shift[r], state_, r, weights);
        rescale(r, state_.alpha[r]);
      }
      multiply<Step::kValues>(value, cold, n);  // O ← O + P V
      cold = false;
      add_non_finite_keys<E>(
          head_, non_finite_, j0, rows_, row, [&](int32_t r) { return values_of(kv_head_of(r)); }, s_,
          kDecodeKeys, o_, padded(p.value_dim));
    }
    for (int32_t r = 0; p.v_scale && !head_.value.page_factors && r < rows_; ++r) {
      rescale(r, scale_of(p.v_scale, kv_head_of(r)));
    }
  }

  // O ← αO
  void rescale(int32_t r, float alpha) {
    if (alpha == 1.0f) return;
    const int32_t ld = padded(problem_.value_dim);
    for (int32_t c = r * ld; c < (r + 1) * ld; c += kLanes) store(o_ + c, load(o_ + c) * alpha);
  }

  // The KV head of row r, counted from the tile's first.
  int32_t kv_head_of(int32_t r) const { return tile_.head_of(r) / group_ - problem_.kv_head(tile_.head); }

  // The scale of float8 keys or values at the tile's KV head x, if all pages share it.
  float scale_of(const View& scale, int32_t x) const {
    return scale ? head_.at(scale, (problem_.kv_head(tile_.head) + x) * scale.head) : 1.0f;
  }

  // The values at the tile's KV head x. A scale that all pages share is not applied here but to O.
  Rows values_of(int32_t x) const {
    Rows values = head_.value;
    values.base += x * problem_.value.head * size_of(values.dtype);
    values.factor = 1.0f;
    if (values.page_factors) values.page_factors += x * problem_.v_scale.head;
    return values;
  }

  // If each page has its own scale: the scales of the tile's n keys (or values) at KV head x, then ones.
  float* factors_of(int32_t x) const { return factors_ + x * kDecodeKeys; }
  void load_factors(const Rows& rows, const View& scale, int32_t j0, int32_t n) {
    for (int32_t x = 0; rows.page_factors && x < tile_.heads / group_; ++x) {
      Rows of_head = rows;
      of_head.page_factors += x * scale.head;
      of_head.factors(j0, n, factors_of(x));
      for (int32_t r = n; r < kDecodeKeys; ++r) factors_of(x)[r] = 1.0f;
    }
  }

  // The scales of keys r (even lanes) and r + 1 (odd lanes) at KV head x.
  Float key_factors(int32_t r, int32_t x) const {
    if (!head_.key.page_factors) return broadcast(scale_of(problem_.k_scale, x));
    const float* const two = factors_of(x) + r;
    return lane_indices() % 2 == 0 ? broadcast(two[0]) : broadcast(two[1]);
  }

  template <Step step>
  void multiply(const DecodeStream& stream, bool cold, int32_t n) {
    if constexpr (E::kPair > 1) {
      if (stream.rows.dtype == DType::kF8E4M3)
        return multiply_as<step, DType::kF8E4M3, false>(stream, cold, n);
      if (stream.rows.dtype == DType::kF8E5M2)
        return multiply_as<step, DType::kF8E5M2, false>(stream, cold, n);
      multiply_as<step, DType::kBF16, false>(stream, cold, n);
    } else {
      switch (stream.rows.dtype) {
        case DType::kF32:
          return multiply_from<step, DType::kF32>(stream, cold, n);
        case DType::kBF16:
          return multiply_from<step, DType::kBF16>(stream, cold, n);
        case DType::kF16:
          return multiply_from<step, DType::kF16>(stream, cold, n);
        case DType::kF8E4M3:
          return multiply_from<step, DType::kF8E4M3>(stream, cold, n);
        case DType::kF8E5M2:
          return multiply_from<step, DType::kF8E5M2>(stream, cold, n);
      }
    }
  }

  template <Step step, DType dtype>
  void multiply_from(const DecodeStream& stream, bool cold, int32_t n) {
    if (stream.rows.width % kLanes == 0) return multiply_as<step, dtype, false>(stream, cold, n);
    multiply_as<step, dtype, true>(stream, cold, n);
  }

  // Multiplies the tile's n keys at all KV heads, from memory or, if `widened`, from a padded float32 copy.
  template <Step step, DType dtype, bool widened>
  void multiply_as(const DecodeStream& stream, bool cold, int32_t n) {
    const int32_t ld = padded(stream.rows.width), width = widened ? ld : stream.rows.width;
    const int32_t lines = (kStepKeys * stream.key_lines + stream.heads - 1) / stream.heads;
    constexpr DType from = widened ? DType::kF32 : dtype;
    alignas(64) float wide[widened ? kStepKeys * kMaxLatentDim : 1];
    Prefetcher ahead{stream, cold ? 0 : stream.ahead, min(stream.addressed, kDecodeKeys + stream.ahead)};
    if (cold) ahead.run(stream.ahead * stream.key_lines);
    for (int32_t r = 0; r < n; r += kStepKeys) {
      for (int32_t x = 0; x < stream.heads; ++x) {
        const char* at[kStepKeys];
        ahead.run(lines);
        stream.addresses(r, n, x, at);
        const Float factor = step == Step::kScores ? key_factors(r, x) : Float{};
        if constexpr (widened) {
          for (int32_t i = 0; i < kStepKeys; ++i) {
            load_row(dtype, at[i], stream.rows.width, 1.0f, wide + i * ld, ld);
            at[i] = reinterpret_cast<const char*>(wide + i * ld);
          }
        }
        for (int32_t first = x * group_; first < rows_; first += tile_.heads) {
          float* s = s_ + first * kDecodeKeys;
          if constexpr (step == Step::kScores) {
            rows_step<E, step, from>(at, factor, group_, q_ + first * row_words<E>(width), width, s + r);
          } else {
            rows_step<E, step, from>(at, factor, group_, reinterpret_cast<const Word*>(s) + r / E::kPair,
                                     width, o_ + first * ld);
          }
        }
      }
    }
  }

  const Problem& problem_;
  Head head_;
  const RowTile& tile_;
  int32_t rows_, group_;
  Word* q_;         // [kTileM, row_words(d)]
  float *s_, *o_;   // [kTileM, kDecodeKeys], [kTileM, padded(dv)]
  float* factors_;  // [KV heads, kDecodeKeys], of keys, then of values
  NonFiniteKeys non_finite_;
  Softmax state_;
};

}  // namespace jax_flash::JF_ISA
