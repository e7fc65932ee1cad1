// The static options of one call (csrc/spec.def) and its optional operands.
#pragma once

#include <cstdint>

#include "../spec.def"

#if defined(__CUDACC__)
#define JF_HD __host__ __device__ __forceinline__
#define JF_HD_NOINLINE static __host__ __device__ __noinline__
#else
#define JF_HD inline
#define JF_HD_NOINLINE inline
#endif

namespace jax_flash {

enum class Layout : int32_t { kFixed = 0, kVarlen = 1, kPaged = 2, kPagedVarlen = 3 };
enum class PageLayout : int32_t { kNhd = 0, kHnd = 1 };
enum class Align : int32_t { kBottomRight = 0, kTopLeft = 1 };
enum class DType : int32_t { kF16 = 0, kBF16 = 1, kF32 = 2, kF8E4M3 = 3, kF8E5M2 = 4 };

// Only page pools have a float8 dtype.
JF_HD constexpr bool is_float8(DType dtype) { return dtype == DType::kF8E4M3 || dtype == DType::kF8E5M2; }
JF_HD constexpr int64_t size_of(DType dtype) { return dtype == DType::kF32 ? 4 : is_float8(dtype) ? 1 : 2; }

// kDecode is a pass of csrc/kernels.def but not a custom call of its own: forward uses it for few query rows.
// kAppend stands for append_kv, whose custom calls have an AppendProblem.
enum class Pass : int32_t {
  kForward = 0,
  kBackward = 1,
  kBiasGradient = 2,
  kDecode = 3,
  kTangent = 4,
  kAppend = 5
};

// Optional operands in call order; the value is the bit in AttentionSpec::operands.
enum class Operand : int32_t {
#define JF_OPTIONAL(id, ...) k##id,
#define JF_OPTIONAL_TANGENT(id, ...) k##id,
#include "../operands.def"
  kCount,
};

template <class... Operands>
constexpr int32_t bits_of(Operands... operands) {
  return ((1 << static_cast<int32_t>(operands)) | ...);
}

// Operands that move the band (band.h).
inline constexpr int32_t kOfBand =
    bits_of(Operand::kPosition, Operand::kWindowLeft, Operand::kWindowRight, Operand::kWindowOffset);

// Operands that every kernel reads. In CUDA's plan any other operand selects a kind of score, or else the
// general kernel.
inline constexpr int32_t kOfEveryKernel =
    kOfBand | bits_of(Operand::kCuSeqlensQ, Operand::kCuSeqlensK, Operand::kQLengths, Operand::kKvLengths,
                      Operand::kSinks, Operand::kBlockTables, Operand::kKScale, Operand::kVScale,
                      Operand::kTbias);

// Operands that decode reads. Calls with any other operand do not run it.
inline constexpr int32_t kOfDecode =
    kOfEveryKernel | bits_of(Operand::kAlibiSlopes, Operand::kDraftMask, Operand::kRanges,
                             Operand::kBlockMask, Operand::kMask);

// Optional operands of append_kv in call order, bits of AppendSpec::operands.
enum class AppendOperand : int32_t {
#define JF_APPEND_OPTIONAL(id, ...) k##id,
#include "../operands.def"
  kCount,
};

inline constexpr int32_t kUnlimited = -1;

// The largest head dims and rows of pools: kMaxHeadDim, kMaxLatentDim, kMaxPoolColumns.
#define JF_LIMIT(id, value) inline constexpr int32_t k##id = value;
#include "../operands.def"

#define JF_MEMBER(type, name) type name{};
struct AttentionSpec {
  JF_ATTENTION_FIELDS(JF_MEMBER)

  bool operator==(const AttentionSpec&) const = default;
  JF_HD bool has(Operand operand) const { return operands >> static_cast<int32_t>(operand) & 1; }
  // Whether operands move the band, so that `left` and `right` do not tell what a row sees.
  JF_HD bool moves_band() const { return (operands & kOfBand) != 0; }
  // Whether K and V are one array. Its gradient, dkey, is the sum of both gradients.
  JF_HD bool shared_kv() const { return value_dim > 0; }
  JF_HD bool paged() const { return layout == Layout::kPaged || layout == Layout::kPagedVarlen; }
  // Whether the query rows of all sequences share one dimension.
  JF_HD bool packed() const { return layout == Layout::kVarlen || layout == Layout::kPagedVarlen; }
};

struct AppendSpec {
  JF_APPEND_FIELDS(JF_MEMBER)

  JF_HD bool has(AppendOperand operand) const { return operands >> static_cast<int32_t>(operand) & 1; }
};
#undef JF_MEMBER

}  // namespace jax_flash
