// P and dS of a tile, computed by gradient.cuh with each score variant, from an accumulator of S and of Sᵀ.
#include "cuda/gradient.cuh"
#include "cuda/score/alibi.cuh"
#include "cuda/score/general.cuh"
#include "cuda/score/softcap.cuh"
#include "units.h"

namespace jax_flash::units {
namespace {

constexpr int kRows = 16, kKeys = 64, kElements = kRows * kKeys, kRow = 208, kKey = 192;
constexpr float kSlope = 0.03125f;
constexpr int32_t kShift = 20;  // the diagonal of row i is at i + kShift

struct Options {
  float scale, cap, rate;
  bool alibi;
};

// The factor that delta and dS have.
template <class S, class Score>
float ds_factor(const Options& options) {
  return kOmitsDropoutScale<S, Score> ? 1 - options.rate : 1;
}

struct RowsOf {
  const float *lses, *deltas;
  const int* row;
  float factor;
  __device__ float lse(int slot) const { return row_lse(lses[row[slot]]); }
  __device__ float delta(int slot) const { return deltas[row[slot]] * factor; }
};

// in: S and dP [16, 64], lse and delta [16]; out: P and dS [16, 64].
template <class S, class Score, GradientOf kOf>
struct Gradient {
  Options options;
  float factor = ds_factor<S, Score>(options);
  __device__ void operator()(const float* in, float* out) const {
    static_assert(S::kRows == kRows && S::kColumns == kKeys);
    Problem p{};
    p.spec.scale = options.scale, p.spec.softcap = options.cap, p.dtype = DType::kF32;
    if (options.alibi) p.alibi_slopes.data = &p;
    ScoreOperands operands;
    operands.slope = kSlope;
    if (options.rate > 0) {
      p.dropout.data = &p, p.spec.operands |= 1u << static_cast<int>(Operand::kDropout);
      p.spec.dropout_rate = options.rate;
      operands.dropout = {.key0 = 7, .threshold = static_cast<uint32_t>(options.rate * kDropoutNumbers)};
      operands.dropout.scale = dropout_scale(p.spec);
    }
    const Band band{1 << 20, 1 << 20, kShift, 1 << 20, 0};  // causal
    S s, dp;
    int row[S::kSlots];
    for (int slot = 0; slot < S::kSlots; ++slot) row[slot] = S::row(slot);
    const auto at = [&](int slot, int n, int e) { return row[slot] * kKeys + S::column(n, e); };
    for_each(s, [&](float& x, int slot, int n, int e) { x = in[at(slot, n, e)]; });
    for_each(dp, [&](float& x, int slot, int n, int e) { x = in[kElements + at(slot, n, e)]; });
    const RowsOf rows{in + 2 * kElements, in + 2 * kElements + kRows, row, factor};
    Score score;
    const ScoreTile<float, ScoreOperands> tile{p, operands, band, kRow, kKey};
    score.prefetch_gradient(tile);
    tile_gradient<kOf>(score, tile, rows, true, s, dp);
    for_each(s, [&](float x, int slot, int n, int e) { out[at(slot, n, e)] = x; });
    for_each(dp, [&](float x, int slot, int n, int e) { out[kElements + at(slot, n, e)] = x; });
  }
};

// The score of an element, and its derivative.
struct Element {
  double score, slope;
  Element(const Options& o, int row, int key, double product) : score(o.scale * product), slope(1) {
    if (o.cap > 0) {
      const double t = std::tanh(score / o.cap);
      score = o.cap * t, slope = 1 - t * t;
    }
    if (o.alibi) score -= kSlope * std::abs(kRow + row + kShift - kKey - key);
    if (kKey + key > kRow + row + kShift) score = -INFINITY;
  }
};

template <class S, class Score, GradientOf kOf = GradientOf::kProduct>
void test(const std::string& name, const Options& options) {
  std::vector<float> in = integers(2 * kElements + 2 * kRows);
  const auto element = [&](int i) { return Element(options, i / kKeys, i % kKeys, in[i]); };
  for (int row = 0; row < kRows; ++row) {
    double sum = 0;
    for (int i = row * kKeys; i < (row + 1) * kKeys; ++i) sum += std::exp(element(i).score);
    in[2 * kElements + row] = static_cast<float>(std::log(sum));
  }
  in[2 * kElements + 3] = -INFINITY;  // a row that sees nothing
  const Dropout dropout{.key0 = 7, .threshold = static_cast<uint32_t>(options.rate * kDropoutNumbers)};
  const auto wanted = [&](int i) {
    const int at = i % kElements, row = at / kKeys;
    const double lse = in[2 * kElements + row], delta = std::isinf(lse) ? 0 : in[2 * kElements + kRows + row];
    const bool kept = options.rate == 0 || dropout.keep(0, 0, kRow + row, kKey + at % kKeys);
    const Element e = element(at);
    const double p = std::isinf(lse) ? 0 : std::exp(e.score - lse);
    if (i < kElements) return kept ? Score::kWeightScale * p : 0;
    const double dp = kept ? in[kElements + at] / (1.0 - options.rate) : 0;
    return ds_factor<S, Score>(options) * p * (dp - delta) * (kOf == GradientOf::kProduct ? e.slope : 1);
  };
  const auto got = run(Gradient<S, Score, kOf>{options}, 32, in, 2 * kElements);
  double worst = 0;
  for (int i = 0; i < 2 * kElements; ++i) worst = std::max(worst, std::fabs(got[i] - wanted(i)));
  constexpr double kLimit = Score::kFusesGradient ? 2e-4 : 2e-6;  // these variants round P and dS to 16 bits
  expect("gradient of the score " + name, {worst < kLimit ? 0.0f : static_cast<float>(worst)},
         [](int) { return 0; });
}

template <class S>
void test_layout(const std::string& layout) {
  test<S, PlainScore<S>>("plain, " + layout, {0.5f, 0, 0, false});
  test<S, AlibiScore<S>>("ALiBi, " + layout, {0.5f, 0, 0, true});
  test<S, SoftcapScore<S>>("softcap, " + layout, {0.5f, 1.5f, 0, false});
  test<S, DropoutScore<S>>("dropout, " + layout, {0.5f, 0, 0.25f, false});
  test<S, GeneralScore<S>>("general, " + layout, {0.5f, 1.5f, 0, true});
  test<S, GeneralDropoutScore<S>>("general with dropout, " + layout, {0.5f, 1.5f, 0.25f, true});
  test<S, GeneralScore<S>, GradientOf::kBias>("general, of the bias, " + layout, {0.5f, 1.5f, 0, true});
}

}  // namespace

void test_gradients() {
  test_layout<Accumulator<1, kKeys / 8>>("S");
  test_layout<PermutedAccumulator<1, kKeys / 8>>("S permuted");
  test_layout<TransposedAccumulator<kKeys / 16, kRows / 8>>("S transposed");
}

}  // namespace jax_flash::units
