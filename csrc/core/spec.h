// The static options of one attention call and its optional operands. Mirrors jax_flash/spec.py.
#pragma once

#include <cstdint>

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
// kAppend is append_kv's, whose custom calls have an AppendProblem.
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

// Optional operands of append_kv in call order, bits of AppendSpec::operands.
enum class AppendOperand : int32_t {
#define JF_APPEND_OPTIONAL(id, ...) k##id,
#include "../operands.def"
  kCount,
};

inline constexpr int32_t kUnlimited = -1;

// The largest head dims and rows: kMaxHeadDim, kMaxLatentDim, kMaxPoolColumns.
#define JF_LIMIT(id, value) inline constexpr int32_t k##id = value;
#include "../operands.def"

struct AttentionSpec {
  Layout layout;
  Align align;
  int32_t left;   // keys visible before the diagonal, or kUnlimited
  int32_t right;  // keys visible after the diagonal, or kUnlimited; 0 with causal
  float scale;
  float softcap;       // 0: off
  float dropout_rate;  // 0: off
  bool deterministic;
  int32_t operands;  // bit set of Operand
  // The next three are the paged layouts'.
  PageLayout page_layout = PageLayout::kNhd;
  int32_t num_splits = 0;  // parts of each sequence's keys; 0: chosen by the plan
  bool batch_invariant = false;
  // Not 0: K and V share an array. K is its first columns, V the columns [value_start, value_start +
  // value_dim); where keys are no pages, V is K.
  int32_t value_dim = 0, value_start = 0;
  // Rows and keys of a block of block_mask; 0 without one.
  int32_t block_rows = 0, block_keys = 0;
  bool row_max = false;  // whether the forward has this result

  JF_HD bool has(Operand operand) const { return operands >> static_cast<int32_t>(operand) & 1; }
  // Whether K and V are one array, whose gradient, dkey, is that of both.
  JF_HD bool shared_kv() const { return value_dim > 0; }
  JF_HD bool paged() const { return layout == Layout::kPaged || layout == Layout::kPagedVarlen; }
  // Whether the query rows of all sequences share one dimension.
  JF_HD bool packed() const { return layout == Layout::kVarlen || layout == Layout::kPagedVarlen; }
};

struct AppendSpec {
  PageLayout page_layout;
  bool interleaved;    // rotary pairs are adjacent features
  bool split_columns;  // the last dimension of k_pages is stored as two
  int32_t operands;    // bit set of AppendOperand

  JF_HD bool has(AppendOperand operand) const { return operands >> static_cast<int32_t>(operand) & 1; }
};

}  // namespace jax_flash
