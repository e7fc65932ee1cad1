// csrc/cuda's masks by the operand `ranges`, element by element of a warp's tile.
#include "cuda/score/hopper_ranges.cuh"

#include <climits>
#include <cstring>

#include "cuda/tile/accumulator.cuh"
#include "units.h"

namespace jax_flash::units {
namespace {

constexpr int kQLen = 56, kRow = 8, kKey = 96;  // rows in use; the tile's first row and key

// Whether the limits in `in`, [kQLen, 2 or 4], leave each element of a tile visible.
template <class Accumulator>
struct Left {
  using S = Accumulator;
  static constexpr int kColumns = S::kColumns, kElements = S::kRows * kColumns;
  bool two, by_slot;  // by_slot: hidden slot by slot, as decode does
  __device__ void operator()(const float* in, float* out) const {
    const Band band{kQLen, 1 << 20, 0, 1 << 20, 1 << 20};
    const RowRanges ranges{reinterpret_cast<const int32_t*>(in), 0, two ? 4 : 2, two};
    S s;
    for_each(s, [](float& x, int, int, int) { x = 1; });
    if (by_slot) {
      hide_unseen(s, kKey, [&](int slot) {
        return ranges.seen(0, min(kRow + S::row(slot), kQLen - 1), {kKey, kKey + kColumns});
      });
    } else {
      hide_outside_ranges(s, ranges, band, kRow, kKey);
    }
    for_each(s, [&](float& x, int slot, int n, int e) {
      out[S::row(slot) * kColumns + S::column(n, e)] = x == -INFINITY ? 0 : x;
    });
  }
};

// The same for the kernels of score kind Ranges, whose forward hides by RangesScore and whose backward by
// LimitsOfRow. `in`: as for Left.
template <class Accumulator>
struct LeftByBits {
  using S = Accumulator;
  static constexpr int kColumns = S::kColumns, kElements = S::kRows * kColumns;
  static constexpr int kBefore = 40;  // the tile's keys are counted from this one on
  bool two;

  struct Tile {
    const int& p;
    RowRanges ranges;
    __device__ const Tile& operands() const { return *this; }
    __device__ RowRanges row_ranges(const int&) const { return ranges; }
    __device__ Band band() const { return {kQLen, 1 << 20, 0, 1 << 20, 1 << 20}; }
    __device__ int32_t row() const { return kRow; }
    __device__ int32_t keys_before() const { return kBefore; }
    __device__ Interval in_band(int32_t i) const { return {i - (1 << 30), 1 << 20}; }
  };
  __device__ void operator()(const float* in, float* out) const {
    const int p = 0;
    const Tile tile{p, {reinterpret_cast<const int32_t*>(in), 0, two ? 4 : 2, two}};
    S s;
    for_each(s, [](float& x, int, int, int) { x = 1; });
    if constexpr (kColumns > 16) {
      RangesScore<S> score;
      score.find_seen(tile, kKey - kBefore);
      score.hide(s);
    } else {
      const auto sees = [&](int slot, int e) {
        const int32_t row = kRow + S::row(slot);
        LimitsOfRow limits;
        limits.load(tile.ranges, min(row, kQLen - 1));
        return row >= kQLen || limits.bits({kKey, kKey + kColumns}, kKey) >> e & 1;
      };
      for_each(s, [&](float& x, int slot, int n, int e) { x = sees(slot, S::column(n, e)) ? x : -INFINITY; });
    }
    for_each(s, [&](float& x, int slot, int n, int e) {
      const bool used = kRow + S::row(slot) < kQLen;  // unused rows may keep any score
      out[S::row(slot) * kColumns + S::column(n, e)] = used && x == -INFINITY ? 0 : 1;
    });
  }
};

// Limits around the keys of a tile, some of them far away, in any order.
std::vector<int32_t> limits(size_t count, int columns) {
  std::vector<int32_t> x(count);
  uint32_t state = 12345;
  for (int32_t& value : x) {
    state = state * 1664525u + 1013904223u;
    const uint32_t draw = state >> 16;
    constexpr int32_t kFar[] = {INT_MIN, INT_MAX, -1, 0, kKey, kKey - 1, INT_MIN + 1};
    value = draw % 5 == 0 ? kFar[draw / 5 % 7] : kKey - 8 + static_cast<int32_t>(draw / 5) % (columns + 16);
  }
  return x;
}

template <class Body>
void test_left(const std::string& name, Body body, bool two, bool by_slot, bool all = false) {
  const int count = two ? 4 : 2;
  std::vector<int32_t> own = limits(static_cast<size_t>(kQLen) * count, Body::kColumns);
  if (all) {  // all rows see the whole tile, except for one row
    for (int i = 0; i < kQLen * count; ++i) own[i] = i % 2 ? kKey + Body::kColumns : kKey;
    own[(kRow + 5) * count] = kKey + 3;
    if (two) own[(kRow + 5) * count + 2] = kKey + 4;
  }
  std::vector<float> in(own.size());
  std::memcpy(in.data(), own.data(), own.size() * sizeof(float));
  const auto wanted = [&](int i) {
    const int row = kRow + i / Body::kColumns, key = kKey + i % Body::kColumns;
    if (row >= kQLen && !by_slot) return 1;
    const int32_t* x = own.data() + static_cast<size_t>(row < kQLen ? row : kQLen - 1) * count;
    return (x[0] <= key && key < x[1]) || (two && x[2] <= key && key < x[3]) ? 1 : 0;
  };
  expect(name + (two ? ", two ranges a row" : ", one range a row") + (all ? ", almost all" : ""),
         run(body, 32, in, Body::kElements), wanted);
}

template <class S>
void test_left(const std::string& name, bool by_slot = false) {
  for (bool two : {false, true}) {
    for (bool all : {false, true}) test_left(name, Left<S>{two, by_slot}, two, by_slot, all);
  }
}

template <class S>
void test_left_by_bits(const std::string& name) {
  for (bool two : {false, true}) {
    for (bool all : {false, true}) test_left(name, LeftByBits<S>{two}, two, false, all);
  }
}

}  // namespace

void test_ranges() {
  test_left<Accumulator<1, 16>>("ranges of S");
  test_left<Accumulator<2, 10>>("ranges of 32 rows of S");
  test_left<PermutedAccumulator<1, 8>>("ranges of a permuted S");
  test_left<TransposedAccumulator<1, 8>>("ranges of a transposed S");
  test_left<TransposedAccumulator<1, 2>>("ranges of 16 rows of a transposed S");
  test_left<TransposedAccumulator<2, 1>>("ranges in decode", true);
  test_left_by_bits<Accumulator<1, 16>>("bits of ranges of S");
  test_left_by_bits<Accumulator<1, 10>>("bits of ranges of 80 keys");
  test_left_by_bits<Accumulator<1, 2>>("bits of ranges of 16 keys");
}

}  // namespace jax_flash::units
