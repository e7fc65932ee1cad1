// Tests that every wrapper of csrc/cuda/ptx does what its comment says.
#include "cuda/ptx/atomic.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/float8.cuh"
#include "cuda/ptx/ldmatrix.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/movmatrix.cuh"
#include "cuda/ptx/reduce.cuh"
#include "cuda/ptx/shared.cuh"
#include "units.h"

namespace jax_flash::units {
namespace {

// 32 threads add 1 to a counter that begins at 100, and each notes what it finds there.
struct Counter {
  __device__ void operator()(const float*, float* out) const {
    auto* const counter = reinterpret_cast<unsigned long long*>(out);
    if (threadIdx.x == 0) {
      const unsigned long long found = ptx::load_relaxed(counter);
      ptx::exchange_if(counter, found + 1, 7);
      ptx::exchange_if(counter, found, 100);
    }
    __syncthreads();
    const auto place = ptx::add_released(counter, 1) - 100;
    ptx::acquire();
    if (place < 32) out[2 + place] = 1;
    __syncthreads();
    if (threadIdx.x == 0) out[0] = static_cast<float>(ptx::load_relaxed(counter)), out[1] = 0;
  }
};

struct SharedByBlocks {  // copies what other blocks may have written
  __device__ void operator()(const float* in, float* out) const {
    const uint32_t i = threadIdx.x;
    reinterpret_cast<float4*>(out)[i] = ptx::load_shared_by_blocks(reinterpret_cast<const float4*>(in) + i);
    reinterpret_cast<float2*>(out + 8)[i] =
        ptx::load_shared_by_blocks(reinterpret_cast<const float2*>(in + 8) + i);
  }
};

struct Exp2 {
  __device__ void operator()(const float* in, float* out) const {
    out[threadIdx.x] = ptx::exp2(in[threadIdx.x]);
  }
};

struct Log2 {
  __device__ void operator()(const float* in, float* out) const {
    out[threadIdx.x] = ptx::log2(in[threadIdx.x]);
  }
};

struct Reciprocal {
  __device__ void operator()(const float* in, float* out) const {
    out[threadIdx.x] = ptx::reciprocal(in[threadIdx.x]);
  }
};

// Writes each pair of numbers after pack and unpack, then after store_pair.
template <class T>
struct Pairs {
  __device__ void operator()(const float* in, float* out) const {
    const float low = in[2 * threadIdx.x], high = in[2 * threadIdx.x + 1];
    const float2 pair = ptx::unpack<T>(ptx::pack<T>(low, high));
    out[2 * threadIdx.x] = pair.x, out[2 * threadIdx.x + 1] = pair.y;
    T* stored = reinterpret_cast<T*>(ptx::dynamic_shared()) + 2 * threadIdx.x;
    ptx::store_pair(stored, low, high);
    out[64 + 2 * threadIdx.x] = static_cast<float>(stored[0]);
    out[64 + 2 * threadIdx.x + 1] = static_cast<float>(stored[1]);
  }
};

// Two float16: a normal one in the high half, a subnormal one in the low half.
constexpr uint32_t kHalves = 0x5123u << 16 | 0x0007u;

enum class OnWord { kEvenBytes, kOddBytes, kSignOfLow, kSignOfHigh, kSizeNotBelow };

// Applies an operation on words; `in` and `out` hold their halves.
template <OnWord kWhat>
struct ApplyToWord {
  __device__ static uint32_t apply(uint32_t x) {
    switch (kWhat) {
      case OnWord::kEvenBytes:
        return ptx::even_bytes(x);
      case OnWord::kOddBytes:
        return ptx::odd_bytes(x);
      case OnWord::kSignOfLow:
        return ptx::sign_of_low(x);
      case OnWord::kSignOfHigh:
        return ptx::sign_of_high(x);
      default:
        return ptx::size_not_below(x, kHalves);
    }
  }
  __device__ void operator()(const float* in, float* out) const {
    const auto low = static_cast<uint32_t>(in[2 * threadIdx.x]);
    const auto high = static_cast<uint32_t>(in[2 * threadIdx.x + 1]);
    const uint32_t x = apply(low | high << 16);
    out[2 * threadIdx.x] = static_cast<float>(x & 0xFFFF);
    out[2 * threadIdx.x + 1] = static_cast<float>(x >> 16);
  }
};

// Widens every float8, two at a time.
template <class T, DType kFormat>
struct Widened {
  __device__ void operator()(const float*, float* out) const {
    const uint32_t two = threadIdx.x | (255 - threadIdx.x) << 8;
    const float2 x = ptx::unpack<T>(ptx::widen_float8<T, kFormat>(two));
    out[2 * threadIdx.x] = x.x, out[2 * threadIdx.x + 1] = x.y;
  }
};

template <DType kFormat>
void test_float8(const std::string& format) {
  const auto float8 = [](int i) -> double {
    return float8_to_float<kFormat>(static_cast<uint8_t>(i % 2 ? 255 - i / 2 : i / 2));
  };
  expect("widen_float8 " + format + " float16", run(Widened<float16, kFormat>{}, 256, {}, 512), float8);
  expect("widen_float8 " + format + " bfloat16", run(Widened<bfloat16, kFormat>{}, 256, {}, 512), float8);
}

struct ThreadIndex {
  __device__ void operator()(const float*, float* out) const {
    out[threadIdx.x] = static_cast<float>(ptx::thread_index());
  }
};

// Copies 16 bytes per thread, then 4; every third copy is not valid.
struct Copies {
  __device__ void operator()(const float* in, float* out) const {
    const int i = static_cast<int>(threadIdx.x);
    const uint32_t shared = ptx::shared_address(ptx::dynamic_shared());
    ptx::cp_async_16(shared + 16 * i, in + 4 * i, i % 3 != 0);
    ptx::cp_async_commit();
    ptx::cp_async_4(shared + 512 + 4 * i, in + i, i % 3 != 1);
    ptx::cp_async_commit();
    ptx::cp_async_wait<1>();
    for (int e = 0; e < 4; ++e) {
      out[4 * i + e] = __uint_as_float(ptx::load_shared(shared + 16 * i + 4 * e));
    }
    ptx::cp_async_wait<0>();
    out[128 + i] = __uint_as_float(ptx::load_shared(shared + 512 + 4 * i));
  }
};

struct Stores {
  __device__ void operator()(const float* in, float* out) const {
    const int i = static_cast<int>(threadIdx.x);
    const uint32_t shared = ptx::shared_address(ptx::dynamic_shared());
    const float* x = in + 4 * i;
    ptx::store_shared(shared + 16 * i, uint4{__float_as_uint(x[0]), __float_as_uint(x[1]),
                                             __float_as_uint(x[2]), __float_as_uint(x[3])});
    __syncthreads();
    const auto* read = reinterpret_cast<const float*>(ptx::dynamic_shared());
    for (int e = 0; e < 4; ++e) out[4 * i + e] = read[4 * (31 - i) + e];
  }
};

// A ring with one stage: in each phase warp 0 copies 32 numbers into it and warp 1 reads them.
template <bool kAsynchronous>
struct Ring {
  static constexpr int kPhases = 5;
  __device__ void operator()(const float* in, float* out) const {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const uint32_t full = ptx::shared_address(ptx::dynamic_shared()), empty = full + ptx::kBarrierBytes,
                   slot = full + 128 + 4 * lane;
    if (threadIdx.x == 0) ptx::barrier_init(full, 32), ptx::barrier_init(empty, 32);
    __syncthreads();
    for (int phase = 0; phase < kPhases; ++phase) {
      if (threadIdx.x < 32) {
        if (phase > 0) ptx::barrier_wait(empty, phase - 1);
        ptx::cp_async_4(slot, in + 32 * phase + lane, true);
        if (kAsynchronous) {
          ptx::barrier_arrive_after_copies(full);
        } else {
          ptx::cp_async_commit();
          ptx::cp_async_wait<0>();
          ptx::barrier_arrive(full);
        }
      } else {
        ptx::barrier_wait(full, phase);
        const uint32_t other = slot - 4 * lane + 4 * (31 - lane);
        out[32 * phase + lane] = __uint_as_float(ptx::load_shared(other));
        ptx::barrier_arrive(empty);
      }
    }
  }
};

// Two groups of two warps reverse their numbers, the second group three times.
struct Groups {
  __device__ void operator()(const float* in, float* out) const {
    const int group = static_cast<int>(threadIdx.x / 64), i = static_cast<int>(threadIdx.x % 64);
    auto* x = reinterpret_cast<float*>(ptx::dynamic_shared()) + 64 * group;
    x[i] = in[threadIdx.x];
    for (int round = 0; round < 1 + 2 * group; ++round) {
      ptx::sync_group(1 + group, 64);
      const float mirrored = x[63 - i];
      ptx::sync_group(1 + group, 64);
      x[i] = mirrored;
    }
    out[threadIdx.x] = x[i];
  }
};

// Loads four 8 × 8 matrices of 16-bit numbers, matrix m from in[64 m], and writes each register's two
// numbers.
template <bool kTransposed>
struct Ldmatrix {
  __device__ void operator()(const float* in, float* out) const {
    const int lane = static_cast<int>(threadIdx.x);
    auto* rows = reinterpret_cast<uint16_t*>(ptx::dynamic_shared());
    for (int c = 0; c < 8; ++c) rows[8 * lane + c] = static_cast<uint16_t>(in[8 * lane + c]);
    __syncthreads();
    uint32_t r[4];
    const uint32_t address = ptx::shared_address(rows + 8 * lane);
    if (kTransposed) {
      ptx::ldmatrix_x4_trans(r, address);
    } else {
      ptx::ldmatrix_x4(r, address);
    }
    for (int m = 0; m < 4; ++m) {
      out[64 * m + 2 * lane] = static_cast<float>(r[m] & 0xFFFF);
      out[64 * m + 2 * lane + 1] = static_cast<float>(r[m] >> 16);
    }
  }
};

struct Transpose {
  __device__ void operator()(const float* in, float* out) const {
    const auto low = static_cast<uint32_t>(in[2 * threadIdx.x]);
    const auto high = static_cast<uint32_t>(in[2 * threadIdx.x + 1]);
    const uint32_t x = ptx::transpose(low | high << 16);
    out[2 * threadIdx.x] = static_cast<float>(x & 0xFFFF),
            out[2 * threadIdx.x + 1] = static_cast<float>(x >> 16);
  }
};

// C [16, 8] += A [16, K] B [K, 8], where C is 1 at first. The fragments are those of mma.cuh.
template <class T>
struct Mma {
  using Element = T;
  static constexpr int kPair = sizeof(T) == 2 ? 2 : 1, kDepth = 8 * kPair;

  __device__ static uint32_t word(const float* x, int step) {
    if constexpr (sizeof(T) == 2) return ptx::pack<T>(x[0], x[step]);
    return __float_as_uint(x[0]);
  }
  __device__ void operator()(const float* in, float* out) const {
    const int g = static_cast<int>(threadIdx.x / 4), t = static_cast<int>(threadIdx.x % 4);
    const float *a = in, *b = in + 16 * kDepth;
    uint32_t af[4], bf[2];
    for (int i = 0; i < 4; ++i) {
      af[i] = word(a + (g + i % 2 * 8) * kDepth + kPair * t + i / 2 * 4 * kPair, 1);
    }
    for (int i = 0; i < 2; ++i) bf[i] = word(b + (kPair * t + i * 4 * kPair) * 8 + g, 8);
    float c[4] = {1, 1, 1, 1};
    ptx::mma<T>(c, af, bf[0], bf[1]);
    for (int i = 0; i < 4; ++i) out[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = c[i];
  }
};

// Adds twice to a block of 128 and writes it in the order of the lanes' elements.
struct AddFragment {
  __device__ void operator()(const float* in, float* out) const {
    const int lane = static_cast<int>(threadIdx.x);
    float x[4], read[4][4];
    for (int i = 0; i < 4; ++i) x[i] = in[4 * lane + i], out[128 + 4 * lane + i] = 0;
    __syncthreads();
    for (int round = 0; round < 2; ++round) ptx::add_fragment(out + 128, lane, x);
    __syncthreads();
    ptx::load_fragments(read, out + 128, lane / 4);
    for (int i = 0; i < 4; ++i) out[4 * lane + i] = read[lane % 4][i];
  }
};

template <class T>
void test_pairs(const char* name) {
  std::vector<float> x(64);
  for (int i = 0; i < 64; ++i)
    x[i] = std::sin(1.0f + static_cast<float>(i)) * std::exp2(static_cast<float>(i % 9));
  expect(std::string("pack, unpack, store_pair ") + name, run(Pairs<T>{}, 32, x, 128),
         [&](int i) { return static_cast<float>(T(x[i % 64])); });
}

template <class T>
void test_mma(const char* name, bool integral) {
  constexpr int kDepth = Mma<T>::kDepth;
  std::vector<float> in = integers(24 * kDepth);
  for (size_t i = 0; i < in.size() && !integral; ++i) in[i] = 1 + std::fabs(std::sin(static_cast<float>(i)));
  const auto product = [&](int i) {
    double sum = 1;
    for (int k = 0; k < kDepth; ++k) {
      sum += static_cast<double>(in[i / 8 * kDepth + k]) * in[16 * kDepth + k * 8 + i % 8];
    }
    return sum;
  };
  expect(std::string("mma ") + name, run(Mma<T>{}, 32, in, 128), product, integral ? 0 : 0x1p-20);
}

void test_arithmetic() {
  std::vector<float> x(256);
  for (int i = 0; i < 256; ++i) x[i] = static_cast<float>(i - 128) * 0.97f;
  x[0] = -INFINITY;
  expect("exp2", run(Exp2{}, 256, x, 256), [&](int i) { return std::exp2(double{x[i]}); }, 0x1p-22);
  x[0] = 3e30f;
  x[128] = 1e-30f;
  std::vector<float> positive(256);
  for (int i = 0; i < 256; ++i) positive[i] = std::exp2(static_cast<float>(i - 128) * 0.98f);
  expect(
      "log2", run(Log2{}, 256, positive, 256), [&](int i) { return std::log2(double{positive[i]}); },
      0x1p-21);
  expect("reciprocal", run(Reciprocal{}, 256, x, 256), [&](int i) { return 1 / double{x[i]}; }, 0x1p-23);
  test_pairs<float16>("float16");
  test_pairs<bfloat16>("bfloat16");
}

// expected(low half, high half): the result's two halves.
template <OnWord kWhat, class Expected>
void test_word(const char* name, Expected expected) {
  std::vector<float> x(64);
  for (int i = 0; i < 64; ++i) x[i] = static_cast<float>(i * 40503u & 0xFFFFu);
  for (int i = 0; i < 12; ++i) x[i] = static_cast<float>(i / 2 + (i % 2 ? 0x5120 : 4));
  expect(name, run(ApplyToWord<kWhat>{}, 32, x, 64), [&](int i) {
    const uint32_t pair = expected(static_cast<uint32_t>(x[i & ~1]), static_cast<uint32_t>(x[i | 1]));
    return i % 2 ? pair >> 16 : pair & 0xFFFF;
  });
}

void test_words() {
  const auto filled = [](uint32_t half) { return half & 0x8000 ? 0xFFFFu : 0u; };
  test_word<OnWord::kEvenBytes>("even_bytes",
                                [](uint32_t a, uint32_t b) { return (a & 255) | (b & 255) << 8; });
  test_word<OnWord::kOddBytes>("odd_bytes", [](uint32_t a, uint32_t b) { return a >> 8 | b >> 8 << 8; });
  test_word<OnWord::kSignOfLow>("sign_of_low", [&](uint32_t a, uint32_t) { return filled(a) * 0x10001u; });
  test_word<OnWord::kSignOfHigh>("sign_of_high", [&](uint32_t, uint32_t b) { return filled(b) * 0x10001u; });
  test_word<OnWord::kSizeNotBelow>("size_not_below", [](uint32_t a, uint32_t b) {
    return ((a & 0x7FFF) >= (kHalves & 0xFFFF) ? 0xFFFFu : 0) |
           ((b & 0x7FFF) >= kHalves >> 16 ? 0xFFFF0000u : 0);
  });
  test_float8<DType::kF8E4M3>("e4m3");
  test_float8<DType::kF8E5M2>("e5m2");
}

}  // namespace

void test_ptx() {
  test_words();
  test_arithmetic();
  std::vector<float> x(320);
  for (int i = 0; i < 320; ++i) x[i] = static_cast<float>(i + 1);

  expect("thread_index", run(ThreadIndex{}, 96, {}, 96), [](int i) { return i; });
  expect("cp_async, commit, wait", run(Copies{}, 32, x, 160), [&](int i) -> double {
    if (i < 128) return i / 4 % 3 != 0 ? x[i] : 0;
    return (i - 128) % 3 != 1 ? x[i - 128] : 0;
  });
  expect("store_shared, load_shared", run(Stores{}, 32, x, 128),
         [&](int i) { return x[4 * (31 - i / 4) + i % 4]; });
  const auto mirrored = [&](int i) { return x[i / 32 * 32 + 31 - i % 32]; };
  expect("barrier", run(Ring<false>{}, 64, x, 160), mirrored);
  expect("barrier after copies", run(Ring<true>{}, 64, x, 160), mirrored);
  expect("sync_group", run(Groups{}, 128, x, 128), [&](int i) { return x[i / 64 * 64 + 63 - i % 64]; });
  expect("counter", run(Counter{}, 32, {}, 34), [](int i) { return i == 0 ? 132 : i > 1; });
  expect("load_shared_by_blocks", run(SharedByBlocks{}, 2, x, 12), [&](int i) { return x[i]; });

  expect("ldmatrix_x4", run(Ldmatrix<false>{}, 32, x, 256), [&](int i) { return x[i]; });
  const auto transposed = [&](int i) { return x[i / 64 * 64 + i % 8 * 8 + i % 64 / 8]; };
  expect("ldmatrix_x4_trans", run(Ldmatrix<true>{}, 32, x, 256), transposed);
  expect("transpose", run(Transpose{}, 32, x, 64), transposed);
  test_mma<float16>("float16", true);
  test_mma<float>("float32, integers", true);
  test_mma<float>("float32", false);
  if (has_bfloat16()) test_mma<bfloat16>("bfloat16", true);
  std::vector<float> sums = run(AddFragment{}, 32, x, 256);
  sums.resize(128);
  expect("add_fragment, load_fragments", sums, [&](int i) { return 2 * x[i]; });
}

}  // namespace jax_flash::units
