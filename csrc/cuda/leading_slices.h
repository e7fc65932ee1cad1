// A call with several leading dimensions as calls with one. Tensor maps have room for one.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/problem.h"

namespace jax_flash {

inline int64_t element_bytes(DType dtype) {
  return dtype == DType::kF32 ? 4 : dtype == DType::kF16 || dtype == DType::kBF16 ? 2 : 1;
}

// How many slices a call has: all leading dimensions but the last.
inline int64_t leading_slices(const Problem& p) {
  return p.leading.rank <= 1 ? 1 : p.leading.count() / p.leading.size[p.leading.rank - 1];
}

// Slice `index`: the entries of the last leading dimension.
inline Problem leading_slice(const Problem& p, int64_t index) {
  const int64_t activation = element_bytes(p.dtype), key = element_bytes(p.kv_dtype),
                bias = element_bytes(p.bias_dtype);
  using Member = View Problem::*;
  const struct {
    Member view;
    int64_t bytes;
  } views[] = {
      {&Problem::query, activation},  {&Problem::out, activation}, {&Problem::dout, activation},
      {&Problem::dquery, activation}, {&Problem::key, key},        {&Problem::value, key},
      {&Problem::dkey, key},          {&Problem::dvalue, key},     {&Problem::bias, bias},
      {&Problem::dbias, bias},        {&Problem::mask, 1},         {&Problem::lse, 4},
      {&Problem::delta, 4},           {&Problem::cu_seqlens_q, 4}, {&Problem::cu_seqlens_k, 4},
      {&Problem::q_lengths, 4},       {&Problem::kv_lengths, 4},   {&Problem::q_segment_ids, 4},
      {&Problem::kv_segment_ids, 4},  {&Problem::alibi_slopes, 4}, {&Problem::sinks, 4},
      {&Problem::dropout, 4},         {&Problem::block_tables, 4}, {&Problem::k_scale, 4},
      {&Problem::v_scale, 4},         {&Problem::position, 4},
  };
  const int last = p.leading.rank - 1;
  Leading others = p.leading;
  others.rank = last;
  Problem slice = p;
  slice.leading = {1, {p.leading.size[last]}};
  for (const auto& [member, bytes] : views) {
    View& view = slice.*member;
    if (view) view.data = view.as<uint8_t>() + view.leading_offset(others, index) * bytes;
    view.leading[0] = view.leading[last];
  }
  return slice;
}

// Calls launch(slice) for all of them, in order.
template <class Launch>
cudaError_t for_each_slice(const Problem& p, Launch launch) {
  if (p.leading.rank <= 1) return launch(p);
  for (int64_t i = 0, count = leading_slices(p); i < count; ++i) {
    if (cudaError_t e = launch(leading_slice(p, i)); e != cudaSuccess) return e;
  }
  return cudaSuccess;
}

}  // namespace jax_flash
