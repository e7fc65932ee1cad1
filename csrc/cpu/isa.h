// Vector types and functions of the instruction set that this translation unit is compiled for.
//
// kernels.cc is compiled once per instruction set, into namespace JF_ISA. Such a unit must not emit a symbol
// that another unit may define too, or the linker could pick machine code of the wrong instruction set. So no
// std:: function templates are used, and core/ is force-inlined.
#pragma once

#include <cstdint>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../core/spec.h"

#undef JF_HD
#define JF_HD inline __attribute__((always_inline))
#define JF_INLINE static inline __attribute__((always_inline))

namespace jax_flash::JF_ISA {

#if defined(__AVX512F__)
inline constexpr int kLanes = 16;
inline constexpr int kBlockRows = 8;  // microkernel: 8 x 2 accumulators in 32 registers
#elif defined(__AVX2__)
inline constexpr int kLanes = 8;
inline constexpr int kBlockRows = 6;  // 6 x 2 accumulators in 16 registers
#else
inline constexpr int kLanes = 4;
inline constexpr int kBlockRows = 6;
#endif
inline constexpr int kPanel = 2 * kLanes;  // columns of a microkernel block

// Query rows and keys of a forward tile: multiples of kBlockRows and of kPanel.
inline constexpr int kTileM = kBlockRows == 8 ? 64 : 66;
inline constexpr int kTileN = 512;
static_assert(kTileM % kBlockRows == 0 && kTileN % kPanel == 0);

typedef float Float __attribute__((vector_size(kLanes * 4), may_alias));
typedef uint32_t UInt __attribute__((vector_size(kLanes * 4), may_alias));
typedef int32_t Int __attribute__((vector_size(kLanes * 4), may_alias));
typedef uint16_t Half __attribute__((vector_size(kLanes * 2), may_alias));
typedef Float FloatUnaligned __attribute__((aligned(4)));
typedef UInt UIntUnaligned __attribute__((aligned(2)));
typedef Half HalfUnaligned __attribute__((aligned(2)));

inline constexpr float kNegInf = -__builtin_inff();

// x, rounded: GCC 12 and newer contract no product in x with a sum outside.
JF_INLINE Float rounded(Float x) {
#if __has_builtin(__builtin_assoc_barrier)
  return __builtin_assoc_barrier(x);
#else
  return x;
#endif
}

JF_INLINE Float broadcast(float x) { return x - Float{}; }
JF_INLINE Float load(const float* p) { return *reinterpret_cast<const Float*>(p); }
JF_INLINE void store(float* p, Float x) { *reinterpret_cast<Float*>(p) = x; }
JF_INLINE Float max(Float a, Float b) { return a > b ? a : b; }
JF_INLINE int32_t min(int32_t a, int32_t b) { return a < b ? a : b; }
JF_INLINE int32_t max(int32_t a, int32_t b) { return a > b ? a : b; }
JF_INLINE int32_t round_up(int32_t x, int32_t to) { return (x + to - 1) / to * to; }
JF_INLINE int32_t round_down(int32_t x, int32_t to) { return x / to * to; }

using LaneIndices = std::make_integer_sequence<int, kLanes>;

template <int... lane>
JF_INLINE Int lane_numbers(std::integer_sequence<int, lane...>) {
  return Int{lane...};
}
JF_INLINE Int lane_indices() { return lane_numbers(LaneIndices()); }

template <int kStep, int... lane>
JF_INLINE Float exchange_lanes(Float x, std::integer_sequence<int, lane...>) {
  return __builtin_shufflevector(x, x, (lane ^ kStep)...);
}

// Horizontal reductions: combine lanes at distance kStep, kStep / 2, ..., 1.
template <int kStep = kLanes / 2>
JF_INLINE float reduce_max(Float x) {
  x = max(x, exchange_lanes<kStep>(x, LaneIndices()));
  if constexpr (kStep > 1) return reduce_max<kStep / 2>(x);
  return x[0];
}

template <int kStep = kLanes / 2>
JF_INLINE float reduce_sum(Float x) {
  x += exchange_lanes<kStep>(x, LaneIndices());
  if constexpr (kStep > 1) return reduce_sum<kStep / 2>(x);
  return x[0];
}

// 2^x = power * (1 + fraction), fraction = 2^f - 1 with |f| <= 1/2 from a degree-5 minimax polynomial of
// (2^f - 1) / f, relative error 7.5e-9. Below -127 the power is 0; NaN stays NaN.
struct Exp2Parts {
  Float power, fraction;
};

JF_INLINE Exp2Parts exp2_parts(Float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: the low bits of x + kRound are the nearest integer
  const Float clamped = x < -127.0f ? broadcast(-127.0f) : x;
  const Float shifted = clamped + kRound;
  const Float f = clamped - (shifted - kRound);
  Float q = f * 0.0001546973508084193f + 0.0013390866806730628f;
  q = q * f + 0.009618030861020088f;
  q = q * f + 0.055503569543361664f;
  q = q * f + 0.24022650718688965f;
  q = q * f + 0.6931471824645996f;
  const UInt exponent = (reinterpret_cast<UInt>(shifted) << 23) + 0x3F800000u;
  return {reinterpret_cast<Float>(exponent), q * f};
}

// 2^x for x < 128, to float32 accuracy.
JF_INLINE Float exp2(Float x) {
  const Exp2Parts e = exp2_parts(x);
  return e.power * e.fraction + e.power;
}

// 2^f for |f| <= 1/2 by a minimax polynomial: relative error 2.6e-6 (degree 4) or 7.5e-8 (degree 5).
template <int kDegree>
JF_INLINE Float exp2_polynomial(Float f) {
  if constexpr (kDegree == 4) {
    Float p = f * 9.570101276e-3f + 5.591785908e-2f;
    p = p * f + 2.4024744e-1f;
    p = p * f + 6.931217909e-1f;
    return p * f + 0.99999928474f;
  }
  Float p = f * 1.327647129e-3f + 9.675540961e-3f;
  p = p * f + 5.550713092e-2f;
  p = p * f + 2.402212024e-1f;
  p = p * f + 6.931469440e-1f;
  return p * f + 1.0000001192f;
}

// 2^x for x < 128 with the error of exp2_polynomial. Below -127 it is 0; NaN stays NaN.
template <int kDegree>
JF_INLINE Float exp2_fast(Float x) {
#if defined(__AVX512DQ__)
  const __m512 all = (__m512)x, f = _mm512_reduce_ps(all, 0x08);  // x - round(x)
  return (Float)_mm512_scalef_ps((__m512)exp2_polynomial<kDegree>((Float)f), _mm512_sub_ps(all, f));
#else
  constexpr float kRound = 12582912.0f + 127.0f;  // the low bits of the sum are round(x) + 127
  const Float clamped = x < -127.0f ? broadcast(-127.0f) : x;
  const Float shifted = clamped + kRound;
  const Float f = clamped - (shifted - kRound);
  return reinterpret_cast<Float>(reinterpret_cast<UInt>(shifted) << 23) * exp2_polynomial<kDegree>(f);
#endif
}

// tanh |x| = expm1(2|x|) / (expm1(2|x|) + 2), which keeps the relative accuracy of small arguments.
JF_INLINE Float tanh(Float x) {
  constexpr float kTwoLog2e = 2.88539008177792681472f, kSaturated = 9.5f;
  const Float magnitude = x < 0.0f ? -x : x;
  const Float y = (magnitude > kSaturated ? broadcast(kSaturated) : magnitude) * kTwoLog2e;
  const Exp2Parts e = exp2_parts(y);
  const Float expm1 = e.power * e.fraction + (e.power - 1.0f);
  const Float t = expm1 / (expm1 + 2.0f);
  return x < 0.0f ? -t : t;
}

// tanh(x) = 1 − 2 / (2^y + 1) for y = 2 log2(e) x, to an absolute error of 1e-6, for softcaps up to
// kMaxCoarseSoftcap.
JF_INLINE Float tanh_fast(Float y) {
  constexpr float kSaturated = 126.0f;
  const Float e = exp2_fast<4>(kSaturated < y ? broadcast(kSaturated) : y) + 1.0f;
#if defined(__AVX512F__)
  const Float r = (Float)_mm512_rcp14_ps((__m512)e);
  return 1.0f - 2.0f * (r * (2.0f - e * r));  // one Newton step of 1 / e
#else
  return 1.0f - 2.0f / e;
#endif
}

}  // namespace jax_flash::JF_ISA
