// csrc/cuda's scores of one option each, and what dropout keeps, element by element of a warp's tile.
#include "cuda/score/alibi.cuh"
#include "cuda/score/dropout.cuh"
#include "cuda/score/softcap.cuh"
#include "cuda/softmax.cuh"
#include "units.h"

namespace jax_flash::units {
namespace {

constexpr int kRow = 208, kKey = 896;  // position of the tile's first element

// Rows [16, 8 · kTiles] of S, from `in`.
template <int kTiles>
struct Tile {
  using S = Accumulator<1, kTiles>;
  static constexpr int kColumns = 8 * kTiles, kElements = 16 * kColumns;
  __device__ static S read(const float* in) {
    S s;
    for_each(s,
             [&](float& x, int slot, int n, int e) { x = in[S::row(slot) * kColumns + S::column(n) + e]; });
    return s;
  }
  template <class F>
  __device__ static void write(float* out, F value) {
    S all;
    for_each(all, [&](float&, int slot, int n, int e) {
      out[S::row(slot) * kColumns + S::column(n) + e] = value(slot, n, e);
    });
  }
};

template <int kTiles>
struct Kept : Tile<kTiles> {
  Dropout dropout;
  __device__ void operator()(const float*, float* out) const {
    using S = typename Kept::S;
    const uint32_t batch = 3, head = 5;
    const TileDropout tile{dropout, batch, head, kRow, 8 * kTiles};
    const auto kept = dropout.needs_scalar_path() ? tile.numbers_one_by_one<S>() : tile.numbers<S>();
    this->write(out, [&](int slot, int n, int e) {
      const uint32_t half = kept.mask(slot, n) >> 16 * e & 0xFFFFu;
      return half == 0 ? 0.0f : half == 0xFFFFu ? 1.0f : 2.0f;
    });
  }
};

template <int kTiles>
void test_kept(uint32_t row, uint32_t column, uint32_t threshold) {
  using Body = Kept<kTiles>;
  Body body;
  body.dropout = {.key0 = 7, .key1 = 0x89ABCDEFu, .row = row, .column = column, .threshold = threshold};
  const auto keep = [&](int i) {
    const uint32_t at = kRow + i / Body::kColumns, key = 8 * kTiles + i % Body::kColumns;
    return body.dropout.keep(3, 5, at, key);
  };
  expect("kept of " + std::to_string(kTiles) + " column tiles, shard at " + std::to_string(row) + ", " +
             std::to_string(column) + ", threshold " + std::to_string(threshold),
         run(body, 32, {}, Body::kElements), keep);
}

struct Alibi : Tile<16> {
  int32_t shift;
  __device__ void operator()(const float* in, float* out) const {
    Problem p{};
    p.spec.scale = 0.5f;
    ScoreOperands operands;
    operands.slope = 0.25f;
    const Band band{1 << 20, 1 << 20, shift, 1 << 20, 1 << 20};
    S s = read(in);
    float row_term[S::kSlots];
    add_alibi(s, p, operands, band, kRow, kKey, row_term);
    write(out, [&](int slot, int n, int e) { return s.at(slot, n, e) + row_term[slot]; });
    // The four lanes of a row must have the same row_term, because they compare their scores without it.
    for (int slot = 0; slot < S::kSlots; ++slot) {
      if (__shfl_xor_sync(~0u, row_term[slot], 1) != row_term[slot]) out[0] = NAN;
      if (__shfl_xor_sync(~0u, row_term[slot], 2) != row_term[slot]) out[0] = NAN;
    }
  }
};

void test_alibi(int32_t shift) {
  Alibi body;
  body.shift = shift;
  const std::vector<float> in = integers(Alibi::kElements);
  const auto wanted = [&](int i) {
    const int32_t row = kRow + i / Alibi::kColumns, key = kKey + i % Alibi::kColumns;
    return (0.5 * in[i] - 0.25 * std::abs(row + shift - key)) / std::log(2.0);
  };
  expect("alibi, diagonal at " + std::to_string(shift), run(body, 32, in, Alibi::kElements), wanted, 1e-6);
}

struct Capped : Tile<16> {
  float scale, cap;
  int32_t rows = 16, columns = kColumns;  // visible rows and columns
  __device__ void operator()(const float* in, float* out) const {
    AttentionSpec spec{};
    spec.scale = scale, spec.softcap = cap;
    const Band band{kRow + rows, kKey + columns, 0, 1 << 20, 1 << 20};
    S s = read(in);
    Softcap(spec).apply(s, -3.0f, band, [] { return kRow; }, kKey);
    write(out, [&](int slot, int n, int e) { return s.at(slot, n, e); });
  }
};

void test_softcap(float scale, float cap) {
  Capped body;
  body.scale = scale, body.cap = cap;
  const std::vector<float> in = integers(Capped::kElements);
  const auto error = [&](const std::vector<float>& got) {
    double worst = 0;
    for (int i = 0; i < Capped::kElements; ++i)
      worst = std::max(worst,
                       std::fabs(got[i] + 3 - cap * std::tanh(in[i] * double{scale} / cap) / std::log(2.0)));
    return std::vector<float>{worst <= 1e-6 * cap + 1e-6 ? 0.0f : static_cast<float>(worst)};
  };
  expect("softcap " + std::to_string(cap) + " of scores of " + std::to_string(2 * scale),
         error(run(body, 32, in, Capped::kElements)), [](int) { return 0; });
}

// The values of hidden elements must not change any bit of the visible ones.
void test_unseen(float scale) {
  Capped body;
  body.scale = scale, body.cap = 20, body.rows = 9, body.columns = 77;
  const std::vector<float> in = integers(Capped::kElements);
  const auto seen = [&](int i) {
    return i / Capped::kColumns < body.rows && i % Capped::kColumns < body.columns;
  };
  const auto result_beside = [&](float value) {
    std::vector<float> all(Capped::kElements, value), result;
    for (int i = 0; i < Capped::kElements; ++i)
      if (seen(i)) all[i] = in[i];
    const std::vector<float> got = run(body, 32, all, Capped::kElements);
    for (int i = 0; i < Capped::kElements; ++i)
      if (seen(i)) result.push_back(got[i]);
    return result;
  };
  const std::vector<float> clean = result_beside(0);
  for (const float value : {NAN, INFINITY, -INFINITY, 1e4f, -1e4f}) {
    expect("softcap of scores of " + std::to_string(2 * scale) + " beside " + std::to_string(value),
           result_beside(value), [&](int i) { return clean[i]; });
  }
}

// m of each row after the two tiles of `in`; NaN if the row's sum is NaN.
template <int kTiles>
struct Followed : Tile<kTiles> {
  using S = typename Followed::S;
  __device__ void operator()(const float* in, float* out) const {
    UnboundedSoftmax<S::kSlots, float> softmax(1);
    float alpha[S::kSlots], sum[S::kSlots];
    for (int tile = 0; tile < 2; ++tile) {
      S s = this->read(in + tile * this->kElements);
      softmax.update(s, alpha);
      softmax.exponentiate(s, 0, S::kColumnTiles);
    }
    for (int slot = 0; slot < S::kSlots; ++slot) sum[slot] = row_sum(softmax.l[slot]);
    this->write(out, [&](int slot, int, int) { return std::isnan(sum[slot]) ? NAN : softmax.m[slot]; });
  }
};

// value(tile, row, column, size) gives an element; `size` is the magnitude of the others.
template <int kTiles, class F>
void test_row_maxima(const std::string& name, F value) {
  using Body = Followed<kTiles>;
  constexpr int kColumns = Body::kColumns, kElements = Body::kElements;
  std::vector<float> in(2 * kElements);
  for (int i = 0; i < 2 * kElements; ++i) {
    const int row = i / kColumns % 16;
    const float unit = std::exp2(static_cast<float>(row % 5 * 4 - 8));
    in[i] = value(i / kElements, row, i % kColumns, (0.25f + static_cast<float>(i * 37 % 101)) * unit);
  }
  const auto wanted = [&](int i) {
    float m = -FLT_MAX;
    for (int tile = 0; tile < 2; ++tile) {
      for (int column = 0; column < kColumns; ++column) {
        const float x = in[tile * kElements + i / kColumns * kColumns + column];
        m = std::isnan(x) || std::isnan(m) ? NAN : std::fmax(m, x);
      }
    }
    return m;
  };
  expect("row maxima of " + std::to_string(kTiles) + " column tiles, " + name, run(Body{}, 32, in, kElements),
         wanted);
}

template <int kTiles>
void test_row_maxima() {
  const auto mixed = [](int, int row, int column, float size) {
    return column < 8 || (column * 7 + row) % 3 > 0 ? size : -size;  // every lane has some positive scores
  };
  test_row_maxima<kTiles>("every lane has positive scores", mixed);
  test_row_maxima<kTiles>("none has", [](int, int row, int column, float size) {
    if (row == 1 || (row == 2 && column % 7 > 0)) return -INFINITY;
    return row == 3 && column == 5 ? -0.0f : -size;
  });
  test_row_maxima<kTiles>("one lane of a row has one", [](int tile, int row, int column, float size) {
    return column == 42 && row % 2 == tile ? size : -size;
  });
  test_row_maxima<kTiles>("in one tile of two", [&](int tile, int row, int column, float size) {
    return row % 2 == tile ? mixed(tile, row, column, size) : -size;
  });
  for (const float nan : {NAN, -NAN}) {
    test_row_maxima<kTiles>("a NaN", [&](int tile, int row, int column, float size) {
      return tile == 0 && row == 5 && column == 9 ? nan : mixed(tile, row, column, size);
    });
  }
}

}  // namespace

void test_scores() {
  for (uint32_t threshold : {0u, 1u, 0xCCCu, 0x4000u, 0x4001u, 0x7C00u, 0x7C01u, 0x7FFFu, 0x8000u}) {
    test_kept<16>(0, 0, threshold);
    test_kept<12>(16, 32, threshold);
    test_kept<8>(48, 128, threshold);
  }
  test_kept<16>(0, 3, 0x4000);
  test_kept<16>(8, 32, 0x4000);
  test_kept<16>(16, 8, 0x4000);
  test_kept<8>(11, 1001, 0x5800);
  for (int32_t shift : {0, 600, 680, 700, 800, 900, 1000, 5000}) test_alibi(shift);
  test_row_maxima<8>();
  test_row_maxima<10>();
  test_row_maxima<16>();
  for (float scale : {0.01f, 1.0f, 4.0f, 9.0f, 100.0f}) test_softcap(scale, 20), test_unseen(scale);
}

}  // namespace jax_flash::units
