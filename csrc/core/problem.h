// One attention call: spec, sizes and operands. Plain data, the same for every backend and passed by value to
// kernels.
#pragma once

#include "spec.h"
#include "views.h"

namespace jax_flash {

struct Problem {
  AttentionSpec spec;
  DType dtype;       // query, key, value, out and their gradients
  DType bias_dtype;  // bias and its gradient
  Leading leading;
  int32_t batch;                // batch entries (fixed) or sequences (varlen)
  int32_t heads, kv_heads;      // heads % kv_heads == 0
  int32_t head_dim, value_dim;  // d, dv
  int32_t q_rows, k_rows;       // s_q, s_k (fixed) or total tokens (varlen)

  View query, key, value;                                       // [b, s, h, d]
  View out, lse;                                                // lse, delta: [b, h, s] float32
  View dout, delta;                                             //
  View dquery, dkey, dvalue, dbias;                             //
  View cu_seqlens_q, cu_seqlens_k;                              // [n + 1] along batch
  View q_lengths, kv_lengths;                                   // [b]
  View q_segment_ids, kv_segment_ids;                           // [b, s]
  View mask, bias;                                              // [b, h, s_q, s_k]
  View alibi_slopes;                                            // [b, h]
  View sinks;                                                   // [h]
  View dropout;                                                 // [6] along column
  int32_t dbias_batch, dbias_heads, dbias_rows, dbias_columns;  // dbias' own sizes, 1 where it is reduced

  JF_HD int32_t kv_head(int32_t head) const { return head / (heads / kv_heads); }
  JF_HD bool varlen() const { return spec.layout == Layout::kVarlen; }
};

}  // namespace jax_flash
