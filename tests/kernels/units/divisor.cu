// Tests that csrc/core/divisor.h divides as `/` and `%` do, on the GPU.
#include "core/divisor.h"

#include "units.h"

namespace jax_flash::units {
namespace {

// Each thread counts wrong quotients and remainders of dividends near 0, multiples of the divisor, and 2³¹.
struct Quotients {
  Divisor divisor;
  __device__ void operator()(const float*, float* out) const {
    constexpr int32_t kMost = 0x7FFFFFFF;
    const int32_t d = divisor.value, i = min(static_cast<int32_t>(threadIdx.x), kMost / d);
    int wrong = 0, high = (kMost / d - i) * d;
    for (int32_t n : {i, i * d, max(0, i * d - 1), high, max(0, high - 1), kMost - i})
      wrong += divisor.quotient(n) != n / d || divisor.remainder(n) != n % d;
    out[threadIdx.x] = static_cast<float>(wrong);
  }
};

}  // namespace

void test_divisor() {
  for (int64_t d : {1, 2, 3, 5, 7, 8, 12, 64, 100, 1000, 65'537, 1 << 30, (1 << 30) + 1, 0x7FFFFFFF})
    expect("Divisor(" + std::to_string(d) + ")", run(Quotients{Divisor(d)}, 96, {}, 96),
           [](int) { return 0; });
}

}  // namespace jax_flash::units
