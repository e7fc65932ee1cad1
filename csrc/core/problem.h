// One attention call: spec, sizes and operands. It is plain data, the same for every backend and passed to
// kernels by value.
#pragma once

#include "spec.h"
#include "views.h"

namespace jax_flash {

// Kernels that pack heads have a row for each query of a token at each query head of a KV head: row r is of
// token r >> shift and of head r % 2^shift. To them `heads` are KV heads, and the views' heads are of their
// first query heads.
struct HeadPacking {
  int32_t shift = 0, tokens = 0;
  int32_t right = kUnlimited;  // AttentionSpec::right, which counts tokens
};

struct Problem {
  AttentionSpec spec;
  DType dtype;       // dtype of query, out and their gradients
  DType kv_dtype;    // dtype of key, value and their gradients: `dtype`, or float8 in page pools
  DType bias_dtype;  // dtype of bias and its gradient
  Leading leading;
  int32_t batch;                // batch entries (fixed) or sequences
  int32_t heads, kv_heads;      // heads % kv_heads == 0
  int32_t head_dim, value_dim;  // d, dv
  int32_t q_rows, k_rows;       // s_q, s_k (fixed); total tokens (packed); keys of a full table row (paged)
  int32_t page_size, pages, table;  // paged: slots per page, pages of the pool, entries per table row
  int32_t draft_rows;               // rows and columns of the draft mask of a sequence

  View query, key, value;              // [b, s, h, d]; pools: [page, slot, h, d]
  View out, lse;                       // lse, delta: [b, h, s] float32
  View dout, delta;                    //
  View dquery, dkey, dvalue, dbias;    //
  View cu_seqlens_q, cu_seqlens_k;     // [n + 1] along batch
  View q_lengths, kv_lengths;          // [b]
  View q_segment_ids, kv_segment_ids;  // [b, s]
  View mask, bias;                     // [b, h, s_q, s_k]
  View alibi_slopes;                   // [b, h]
  View sinks;                          // [h]
  View dropout;                        // [6] along column
  View block_tables;                   // [b, table] along batch and column
  View k_scale, v_scale;               // [page, h]; batch 0: the same on all pages
  View position;                       // [2] along column: first query, first key
  View draft_mask;                     // [b, row, column]
  HeadPacking packing;
  int32_t dbias_batch, dbias_heads, dbias_rows, dbias_columns;  // sizes of dbias, 1 where broadcast

  JF_HD int32_t kv_head(int32_t head) const { return head / (heads / kv_heads); }
  JF_HD bool varlen() const { return spec.layout == Layout::kVarlen; }
  JF_HD bool packed() const { return spec.packed(); }
  JF_HD bool paged() const { return spec.paged(); }
};

// The tangents of one call, of the pass that computes them. They are no fields of Problem, which every kernel
// takes as a parameter.
struct Tangents {
  View tquery, tkey, tvalue;  // like query, key, value
  View tbias;                 // like bias; none: zero
  View tout, tlse;            // results, like out and lse
};

// One append_kv call: new tokens [b, s, h, d], or packed [t, h, d], are written into pools [page, slot, h,
// d].
struct AppendProblem {
  AppendSpec spec;
  DType dtype;       // key, value
  DType pool_dtype;  // `dtype`, or float8
  bool dynamic;      // k_scale and v_scale are kept: overwritten like the pools
  Leading leading;
  int32_t batch, kv_heads, head_dim, value_dim;
  int32_t rows;                     // new tokens of each sequence, or of all together (packed)
  int32_t page_size, pages, table;  // slots per page, pages of the pool, entries per table row
  int32_t positions, rotated;       // rows of cos and sin, pairs of features that are rotated
  View k_pages, v_pages;            // overwritten
  View key, value;                  //
  View block_tables, kv_lengths;    // [b, table] along batch and column; [b]
  View cu_seqlens;                  // [n + 1] along batch
  View cos, sin;                    // [positions, rotated] along row and column
  View k_scale, v_scale;            // [page, h]; batch 0: the same on all pages; `dynamic`: overwritten

  JF_HD bool packed() const { return spec.has(AppendOperand::kCuSeqlens); }
};

}  // namespace jax_flash
