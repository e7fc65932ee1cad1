// One attention call: spec, sizes and operands. It is plain data, the same for every backend and passed to
// kernels by value.
#pragma once

#include "sizes.h"
#include "spec.h"
#include "views.h"

namespace jax_flash {

// Kernels that pack heads have one row for each token and each query head of a KV head: row r belongs to
// token r >> shift and to head r % 2^shift. In these kernels `heads` counts KV heads, and the view of a head
// begins at the first query head of its group.
struct HeadPacking {
  int32_t shift = 0;
  int32_t left = kUnlimited, right = kUnlimited;  // of AttentionSpec, which count tokens
};

// The names of the views are those in csrc/operands.def and csrc/results.def, which also say their
// dimensions.
struct Problem : Sizes<int32_t> {
  AttentionSpec spec;
  DType dtype;       // dtype of query, out and their gradients
  DType kv_dtype;    // dtype of key, value and their gradients: `dtype`, or float8 in page pools
  DType bias_dtype;  // dtype of bias and its gradient
  Leading leading;

#define JF_REQUIRED(name, ...) View name;
#define JF_OPTIONAL(id, name, ...) View name;
#include "../operands.def"
#define JF_RESULT(name, ...) View name;
#define JF_LIKE(name, ...) View name;
#include "../results.def"

  HeadPacking packing;
  int32_t dbias_batch, dbias_heads, dbias_rows, dbias_columns;  // sizes of dbias, 1 where broadcast

  JF_HD int32_t kv_head(int32_t head) const { return head / (heads / kv_heads); }
  JF_HD bool varlen() const { return spec.layout == Layout::kVarlen; }
  JF_HD bool packed() const { return spec.packed(); }
  JF_HD bool paged() const { return spec.paged(); }
  // Whether a band or ranges limit what rows see, so that some tiles have more steps than others.
  JF_HD bool uneven() const { return spec.left >= 0 || spec.right >= 0 || spec.moves_band() || ranges; }
};

// The tangents of a call, for the tangent pass. They are not fields of Problem, because every kernel takes a
// Problem as a parameter.
struct Tangents {
#define JF_OPTIONAL_TANGENT(id, name, ...) View name;
#include "../operands.def"
#define JF_TANGENT(name, ...) View name;
#include "../results.def"
};

// One append_kv call, which writes new tokens into the pools. It overwrites the views of the results.
struct AppendProblem : Sizes<int32_t> {
  AppendSpec spec;
  DType dtype;       // key, value
  DType pool_dtype;  // `dtype`, or float8
  bool dynamic;      // append_kv updates k_scale and v_scale, too
  Leading leading;

#define JF_APPEND_REQUIRED(name, ...) View name;
#define JF_APPEND_OPTIONAL(id, name, ...) View name;
#include "../operands.def"

  JF_HD bool packed() const { return spec.has(AppendOperand::kCuSeqlens); }
};

}  // namespace jax_flash
