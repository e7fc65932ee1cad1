// Converts rows of f16, bf16, f32 or float8 to and from float32. Never touches memory outside the
// row.
#pragma once

#include "isa.h"
// Included after isa.h, which makes the functions of core/ force-inlined.
#include "../core/float8.h"

namespace jax_flash::JF_ISA {

typedef uint8_t Bytes __attribute__((vector_size(kLanes), may_alias));
typedef Bytes BytesUnaligned __attribute__((aligned(1)));

// The value of a denormal comes from subtracting normal numbers, because XLA's threads may flush denormal
// operands to zero.
JF_INLINE Float widen_f16(UInt h) {
  const UInt sign = (h & 0x8000u) << 16, magnitude = (h & 0x7FFFu) << 13;
  const Float denormal = reinterpret_cast<Float>(magnitude + 0x38800000u) - 6.103515625e-05f;
  const UInt rebias = magnitude >= 0x0F800000u ? UInt{} + 0x70000000u : UInt{} + 0x38000000u;
  const UInt bits = magnitude < 0x00800000u ? reinterpret_cast<UInt>(denormal) : magnitude + rebias;
  return reinterpret_cast<Float>(bits | sign);
}

// The bits of |x| with kShift fewer mantissa bits and another exponent bias, rounded to nearest, ties to
// even. Results are normal from the float32 bits `smallest_normal` on. Smaller numbers become denormals:
// adding `denormal_step`, whose last bit is worth one step of the new denormals, rounds them to whole steps.
template <int kShift>
JF_INLINE UInt round_magnitude(UInt magnitude, uint32_t rebias, uint32_t smallest_normal,
                               float denormal_step) {
  const Float shifted = reinterpret_cast<Float>(magnitude) + denormal_step;
  const UInt denormal = reinterpret_cast<UInt>(shifted) - __builtin_bit_cast(uint32_t, denormal_step);
  constexpr uint32_t kBelowHalf = (1u << (kShift - 1)) - 1;
  const UInt normal = (magnitude - rebias + kBelowHalf + (magnitude >> kShift & 1u)) >> kShift;
  return magnitude < smallest_normal ? denormal : normal;
}

JF_INLINE UInt narrow_f16(Float x) {
  const UInt bits = reinterpret_cast<UInt>(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  UInt h = round_magnitude<13>(magnitude, 0x38000000u, 0x38800000u, 0.5f);  // denormals in steps of 2^-24
  h = magnitude >= 0x477FF000u ? UInt{} + 0x7C00u : h;  // numbers past 65504 round to infinity
  h = magnitude > 0x7F800000u ? UInt{} + 0x7E00u : h;
  return h | sign;
}

// float_to_float8 of core/float8.h, lane by lane.
template <DType dtype>
JF_INLINE UInt narrow_float8(Float x) {
  using F = Float8<dtype>;
  const UInt bits = reinterpret_cast<UInt>(x), sign = bits >> 24 & 0x80u, magnitude = bits & 0x7FFFFFFFu;
  UInt y = round_magnitude<F::kShift>(magnitude, F::kRebias, F::kSmallest, F::kDenormalUnit);
  y = magnitude > F::kLargest ? UInt{} + F::kLargestBits : y;
  y = magnitude > 0x7F800000u ? UInt{} + 0x7Fu : y;
  return y | sign;
}

JF_INLINE Float widen_bf16(UInt h) { return reinterpret_cast<Float>(h << 16); }

JF_INLINE UInt narrow_bf16(Float x) {
  const UInt bits = reinterpret_cast<UInt>(x);
  const UInt rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
  return (bits & 0x7FFFFFFFu) > 0x7F800000u ? bits >> 16 | 0x40u : rounded;
}

JF_INLINE UInt load_halves(const void* row, int32_t i) {
  return __builtin_convertvector(
      static_cast<Half>(*reinterpret_cast<const HalfUnaligned*>(static_cast<const uint16_t*>(row) + i)),
      UInt);
}

// Converts kLanes of f16. The conversion instructions ignore the denormals-are-zero flag for f16, so that
// f16 denormals are exact.
JF_INLINE Float widen_halves(Half h) {
#if defined(__AVX512F__)
  return (Float)_mm512_cvtph_ps((__m256i)h);
#elif defined(__F16C__) && defined(__AVX2__)
  return (Float)_mm256_cvtph_ps((__m128i)h);
#else
  return widen_f16(__builtin_convertvector(h, UInt));
#endif
}

// float8_e5m2 is the upper byte of f16. float8_e4m3fn is f16 with a shorter mantissa and an exponent bias of
// 7 instead of 15, so its bits, read as f16, are a number 2⁸ times too small. Only NaN has other bits.
template <DType dtype>
JF_INLINE Float widen_float8(Bytes x) {
  const Half wide = __builtin_convertvector(x, Half);
  if constexpr (dtype == DType::kF8E5M2) return widen_halves(wide << 8);
  const Half magnitude = (wide & 0x7F) << 7;
  const Half h = magnitude == 0x3F80 ? Half{} + 0x7E00 : magnitude;
  return widen_halves(h | (wide & 0x80) << 8) * 256.0f;
}

template <DType dtype>
JF_INLINE Float load_vector(const void* row, int32_t i) {
  if constexpr (dtype == DType::kF32) {
    return *reinterpret_cast<const FloatUnaligned*>(static_cast<const float*>(row) + i);
  } else if constexpr (is_float8(dtype)) {
    return widen_float8<dtype>(
        *reinterpret_cast<const BytesUnaligned*>(static_cast<const uint8_t*>(row) + i));
  } else {
    const auto h = *reinterpret_cast<const HalfUnaligned*>(static_cast<const uint16_t*>(row) + i);
    return dtype == DType::kF16 ? widen_halves(h)
                                : widen_bf16(__builtin_convertvector(static_cast<Half>(h), UInt));
  }
}

template <DType dtype>
JF_INLINE Half narrow(Float x) {
#if defined(__AVX512BF16__)
  if constexpr (dtype == DType::kBF16) return (Half)_mm512_cvtneps_pbh((__m512)x);
#endif
#if defined(__AVX512F__)
  if constexpr (dtype == DType::kF16) return (Half)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__) && defined(__AVX2__)
  if constexpr (dtype == DType::kF16) return (Half)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#endif
  return __builtin_convertvector(dtype == DType::kF16 ? narrow_f16(x) : narrow_bf16(x), Half);
}

template <DType dtype>
JF_INLINE void store_vector(void* row, int32_t i, Float x) {
  if constexpr (dtype == DType::kF32) {
    *reinterpret_cast<FloatUnaligned*>(static_cast<float*>(row) + i) = x;
  } else if constexpr (is_float8(dtype)) {
    *reinterpret_cast<BytesUnaligned*>(static_cast<uint8_t*>(row) + i) =
        __builtin_convertvector(__builtin_convertvector(narrow_float8<dtype>(x), Half), BytesUnaligned);
  } else {
    *reinterpret_cast<HalfUnaligned*>(static_cast<uint16_t*>(row) + i) = narrow<dtype>(x);
  }
}

template <DType dtype>
static void load_row_as(const void* row, int32_t n, float factor, float* to, int32_t padded) {
  int32_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load_vector<dtype>(row, i) * factor);
  if (i < n) {
    alignas(64) char tail[kLanes * 4] = {};
    __builtin_memcpy(tail, static_cast<const char*>(row) + i * size_of(dtype), (n - i) * size_of(dtype));
    store(to + i, load_vector<dtype>(tail, 0) * factor);
    i += kLanes;
  }
  for (; i < padded; i += kLanes) store(to + i, Float{});
}

template <DType dtype>
static void store_row_as(void* row, int32_t n, const float* from, float factor) {
  int32_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store_vector<dtype>(row, i, load(from + i) * factor);
  if (i < n) {
    alignas(64) char tail[kLanes * 4];
    store_vector<dtype>(tail, 0, load(from + i) * factor);
    __builtin_memcpy(static_cast<char*>(row) + i * size_of(dtype), tail, (n - i) * size_of(dtype));
  }
}

// to[0, n) = factor * row; zeros from there up to `padded`, a multiple of kLanes and at least n.
JF_INLINE void load_row(DType dtype, const void* row, int32_t n, float factor, float* to, int32_t padded) {
  switch (dtype) {
    case DType::kF16:
      return load_row_as<DType::kF16>(row, n, factor, to, padded);
    case DType::kBF16:
      return load_row_as<DType::kBF16>(row, n, factor, to, padded);
    case DType::kF32:
      return load_row_as<DType::kF32>(row, n, factor, to, padded);
    case DType::kF8E4M3:
      return load_row_as<DType::kF8E4M3>(row, n, factor, to, padded);
    case DType::kF8E5M2:
      return load_row_as<DType::kF8E5M2>(row, n, factor, to, padded);
  }
}

// row[0, n) = factor * from; `from` is readable up to a multiple of kLanes.
JF_INLINE void store_row(DType dtype, void* row, int32_t n, const float* from, float factor) {
  switch (dtype) {
    case DType::kF16:
      return store_row_as<DType::kF16>(row, n, from, factor);
    case DType::kBF16:
      return store_row_as<DType::kBF16>(row, n, from, factor);
    case DType::kF32:
      return store_row_as<DType::kF32>(row, n, from, factor);
    case DType::kF8E4M3:
      return store_row_as<DType::kF8E4M3>(row, n, from, factor);
    case DType::kF8E5M2:
      return store_row_as<DType::kF8E5M2>(row, n, from, factor);
  }
}

}  // namespace jax_flash::JF_ISA
