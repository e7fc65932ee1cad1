// The static options of one attention call, and the operands it may carry. Mirrors jax_flash/spec.py and
// operands.py.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define JF_HD __host__ __device__ __forceinline__
#else
#define JF_HD inline
#endif

namespace jax_flash {

enum class Layout : int32_t { kFixed = 0, kVarlen = 1 };
enum class Align : int32_t { kBottomRight = 0, kTopLeft = 1 };
enum class DType : int32_t { kF16 = 0, kBF16 = 1, kF32 = 2 };
enum class Pass : int32_t { kForward = 0, kBackward = 1, kBiasGradient = 2 };

// Optional operands in call order; the value is the bit in AttentionSpec::operands.
enum class Operand : int32_t {
  kCuSeqlensQ = 0,
  kCuSeqlensK,
  kQLengths,
  kKvLengths,
  kQSegmentIds,
  kKvSegmentIds,
  kMask,
  kBias,
  kAlibiSlopes,
  kSinks,
  kDropout,
  kCount,
};

inline constexpr int32_t kUnlimited = -1;

struct AttentionSpec {
  Layout layout;
  Align align;
  int32_t left;   // keys visible before the diagonal, kUnlimited: all
  int32_t right;  // keys visible after it; causal is 0
  float scale;
  float softcap;       // 0: off
  float dropout_rate;  // 0: off
  bool deterministic;
  int32_t operands;  // bit set of Operand

  JF_HD bool has(Operand operand) const { return operands >> static_cast<int32_t>(operand) & 1; }
};

}  // namespace jax_flash
