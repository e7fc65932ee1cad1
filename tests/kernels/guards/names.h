// The views of a call by the names of its operands, so that a fault at a guard page can be told apart.
#pragma once

#include <map>

#include "core/problem.h"

namespace jax_flash {

using ViewNames = std::map<const View*, const char*>;

#define JF_NAMED(field) {&of.field, #field}

inline ViewNames names_of(const Problem& of) {
  return {JF_NAMED(query),        JF_NAMED(key),       JF_NAMED(value),          JF_NAMED(out),
          JF_NAMED(lse),          JF_NAMED(dout),      JF_NAMED(delta),          JF_NAMED(dquery),
          JF_NAMED(dkey),         JF_NAMED(dvalue),    JF_NAMED(dbias),          JF_NAMED(cu_seqlens_q),
          JF_NAMED(cu_seqlens_k), JF_NAMED(q_lengths), JF_NAMED(kv_lengths),     JF_NAMED(q_segment_ids),
          JF_NAMED(mask),         JF_NAMED(bias),      JF_NAMED(kv_segment_ids), JF_NAMED(alibi_slopes),
          JF_NAMED(sinks),        JF_NAMED(dropout),   JF_NAMED(block_tables),   JF_NAMED(k_scale),
          JF_NAMED(v_scale),      JF_NAMED(position),  JF_NAMED(draft_mask)};
}

inline ViewNames names_of(const Tangents& of) {
  return {JF_NAMED(tquery), JF_NAMED(tkey), JF_NAMED(tvalue),
          JF_NAMED(tbias),  JF_NAMED(tout), JF_NAMED(tlse)};
}

inline ViewNames names_of(const AppendProblem& of) {
  return {JF_NAMED(k_pages),      JF_NAMED(v_pages),    JF_NAMED(key),        JF_NAMED(value),
          JF_NAMED(block_tables), JF_NAMED(kv_lengths), JF_NAMED(cu_seqlens), JF_NAMED(cos),
          JF_NAMED(sin),          JF_NAMED(k_scale),    JF_NAMED(v_scale)};
}

#undef JF_NAMED

}  // namespace jax_flash
