// Decodes the operands, results and attributes of the custom calls, which jax_flash/operands.py and spec.py
// write.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "../core/paging.h"
#include "../core/problem.h"
#include "../core/visible/blocks.h"
#include "buffers.h"
#include "xla/ffi/api/ffi.h"

XLA_FFI_REGISTER_ENUM_ATTR_DECODING(::jax_flash::Layout);
XLA_FFI_REGISTER_ENUM_ATTR_DECODING(::jax_flash::PageLayout);
XLA_FFI_REGISTER_ENUM_ATTR_DECODING(::jax_flash::Align);
// This extra macro expands the list of fields to arguments.
#define JF_REGISTER_STRUCT(...) XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(__VA_ARGS__)
#define JF_MEMBER(type, name) , StructMember<decltype(::jax_flash::AttentionSpec::name)>(#name)
JF_REGISTER_STRUCT(::jax_flash::AttentionSpec JF_ATTENTION_FIELDS(JF_MEMBER));
#undef JF_MEMBER
#define JF_MEMBER(type, name) , StructMember<decltype(::jax_flash::AppendSpec::name)>(#name)
JF_REGISTER_STRUCT(::jax_flash::AppendSpec JF_APPEND_FIELDS(JF_MEMBER));
#undef JF_MEMBER
#undef JF_REGISTER_STRUCT

namespace jax_flash {

// The dimensions of a pool in the order of its page layout.
inline schema::Dims in_layout(schema::Dims dims, PageLayout layout) {
  if (dims.of_pool() && layout == PageLayout::kHnd) std::swap(dims.axes[1], dims.axes[2]);
  return dims;
}

class OperandDecoder {
 public:
  OperandDecoder(Pass pass, const AttentionSpec& spec, Problem& problem, Tangents& tangents)
      : pass_(pass), problem_(problem), tangents_(tangents) {
    problem_.spec = spec;
    if (spec.shared_kv()) buffers_.set_value_dim(spec.value_dim);
  }

  ffi::Error decode(ffi::RemainingArgs args, ffi::RemainingRets rets) {
    Problem& p = problem_;
    if (p.paged() && pass_ != Pass::kForward) {
      return operand_error("the derivatives of a paged layout are those of its gathered keys");
    }
    if (ffi::Error e = check_layout(); e.failure()) return e;
    std::vector<Buffer> inputs, outputs;
    const auto& arrays = schema::arrays_of(pass_);
    inputs.reserve(args.size()), outputs.reserve(rets.size());
    for (int32_t i = 0; i < arrays.operand_count; ++i) inputs.push_back(buffer_of(*arrays.operands[i]));
    for (int32_t i = 0; i < static_cast<int32_t>(Operand::kCount); ++i) {
      if (p.spec.has(static_cast<Operand>(i))) inputs.push_back(buffer_of(*schema::kOptional[i]));
    }
    for (int32_t i = 0; i < arrays.result_count; ++i) {
      const schema::Array& result = *arrays.results[i];
      if (schema::is_result(result, p.spec)) outputs.push_back(buffer_of(result));
    }
    ffi::Error e = buffers_.decode(inputs, outputs, args, rets, p.leading);
    if (e.failure()) return e;
    p.dtype = buffers_.dtype(Element::kActivation);
    p.bias_dtype = buffers_.dtype(Element::kBias);
    p.kv_dtype = p.paged() ? buffers_.dtype(Element::kPool) : p.dtype;
    static_cast<Sizes<int32_t>&>(p) = buffers_.sizes();
    if (p.paged()) p.k_rows = table_capacity(p.table, p.page_size);
    if (p.value.data && p.spec.value_start > 0)
      p.value.data = p.value.as<char>() + p.spec.value_start * size_of(p.kv_dtype);
    if (pass_ == Pass::kBiasGradient) read_dbias(rets);
    return check();
  }

 private:
  Buffer buffer_of(const schema::Array& array) {
    const AttentionSpec& spec = problem_.spec;
    View& view = array.view ? problem_.*array.view : tangents_.*array.tangent;
    schema::Dims dims = array.dims[static_cast<int32_t>(spec.layout)];
    if (spec.shared_kv() && (array.view == &Problem::key || array.view == &Problem::value)) {
      dims.axes[dims.rank - 1] = schema::axis_of("pool_columns");
    }
    const bool pool = array.element == Element::kPool && problem_.paged();
    const Element element = array.element == Element::kPool && !pool ? Element::kActivation : array.element;
    return {&view, array.name, element, in_layout(dims, spec.page_layout)};
  }

  void read_dbias(ffi::RemainingRets rets) {
    const auto dims = (*rets.get<ffi::AnyBuffer>(0))->dimensions();
    int32_t* own[] = {&problem_.dbias_batch, &problem_.dbias_heads, &problem_.dbias_rows,
                      &problem_.dbias_columns};
    for (size_t i = 0; i < 4; ++i) *own[i] = static_cast<int32_t>(dims[dims.size() - 4 + i]);
  }

  // Whether the layout has every operand that the spec names.
  ffi::Error check_layout() const {
    const AttentionSpec& spec = problem_.spec;
    for (int32_t i = 0; i < static_cast<int32_t>(Operand::kCount); ++i) {
      const schema::Array& array = *schema::kOptional[i];
      if (spec.has(static_cast<Operand>(i)) && array.dims[static_cast<int32_t>(spec.layout)].rank == 0) {
        return operand_error(std::string(array.name) + " is no operand of this layout");
      }
    }
    return ffi::Error::Success();
  }

  ffi::Error check() const {
    const Problem& p = problem_;
    if (p.heads > 0 && (p.kv_heads == 0 || p.heads % p.kv_heads != 0)) {
      return operand_error("key has " + std::to_string(p.kv_heads) +
                           " heads, which does not divide query's " + std::to_string(p.heads));
    }
    if (p.varlen() && !(p.spec.has(Operand::kCuSeqlensQ) && p.spec.has(Operand::kCuSeqlensK))) {
      return operand_error("cu_seqlens_q and cu_seqlens_k are needed by the varlen layout");
    }
    if (p.paged() && !(p.spec.has(Operand::kBlockTables) && p.spec.has(Operand::kKvLengths) &&
                       p.packed() == p.spec.has(Operand::kCuSeqlensQ))) {
      return operand_error(
          "block_tables and kv_lengths are needed by the paged layouts, cu_seqlens_q if packed");
    }
    if (p.paged() && p.kv_dtype != p.dtype && !is_float8(p.kv_dtype)) {
      return operand_error("key has a dtype that is neither query's nor float8");
    }
    if (p.draft_mask && (!p.paged() || (!p.packed() && p.draft_rows != p.q_rows))) {
      return operand_error("draft_mask is for pages, with a row and a column for each query");
    }
    if (p.ranges && p.limits != 2 && p.limits != 4) {
      return operand_error("ranges has " + std::to_string(p.limits) + " limits a row, allowed are 2 and 4");
    }
    if (p.block_mask && !(is_block_size(p.spec.block_rows) && is_block_size(p.spec.block_keys))) {
      return operand_error("block_mask has blocks of " + std::to_string(p.spec.block_rows) + " x " +
                           std::to_string(p.spec.block_keys) + ", allowed are 1 and multiples of 16");
    }
    const int64_t value_end = int64_t{p.spec.value_start} + p.spec.value_dim;
    if (p.spec.shared_kv() &&
        !(p.spec.value_start >= 0 && value_end <= p.pool_columns && p.head_dim <= p.pool_columns)) {
      return operand_error("value_dim and value_start are of columns of the keys' array");
    }
    if (p.spec.shared_kv() && !p.paged() && !(p.value_dim == p.head_dim && p.head_dim == p.pool_columns)) {
      return operand_error("where keys are no pages, V is K or an array of its own");
    }
    if (pass_ == Pass::kBiasGradient && !p.spec.has(Operand::kBias)) return operand_error("bias is missing");
    if (p.spec.has(Operand::kTbias) && !(pass_ == Pass::kTangent && p.spec.has(Operand::kBias))) {
      return operand_error("tbias is for the tangent pass, beside bias");
    }
    if (p.spec.dropout_rate > 0 && !p.spec.has(Operand::kDropout)) return operand_error("dropout is missing");
    return ffi::Error::Success();
  }

  Pass pass_;
  Problem& problem_;
  Tangents& tangents_;
  BufferDecoder buffers_;
};

// `problem` and `tangents` are new ones; only the tangent pass fills `tangents`.
inline ffi::Error decode_operands(Pass pass, const AttentionSpec& spec, ffi::RemainingArgs args,
                                  ffi::RemainingRets rets, Problem& problem, Tangents& tangents) {
  return OperandDecoder(pass, spec, problem, tangents).decode(args, rets);
}

// A pool before and after append_kv.
inline ffi::Error same_bytes(ffi::AnyBuffer before, ffi::AnyBuffer after) {
  if (before.size_bytes() == after.size_bytes()) return ffi::Error::Success();
  return operand_error("a pool of append_kv has " + std::to_string(before.size_bytes()) +
                       " bytes, its result " + std::to_string(after.size_bytes()));
}

inline constexpr const schema::CallArrays<schema::AppendArray>& append_arrays(bool dynamic) {
  return dynamic ? schema::kAppendDynamic : schema::kAppend;
}
inline constexpr bool keeps_scales(const schema::CallArrays<schema::AppendArray>& arrays) {
  return &arrays == &schema::kAppendDynamic;
}
// The number of operands that append_kv overwrites: the pools and, if they are dynamic, their scales, which
// come first.
inline int32_t overwritten(bool dynamic) { return append_arrays(dynamic).result_count; }

// The views of overwritten arrays are those of the results, which may alias the operands.
inline ffi::Error decode_append(const AppendSpec& spec, bool dynamic, ffi::RemainingArgs args,
                                ffi::RemainingRets rets, AppendProblem& p) {
  p = AppendProblem{};
  p.spec = spec;
  p.dynamic = dynamic;
  const auto buffer_of = [&](const schema::AppendArray& array) -> Buffer {
    const bool split = spec.split_columns && array.view == &AppendProblem::k_pages;
    return {&(p.*array.view), array.name, array.element, in_layout(array.dims[p.packed()], spec.page_layout),
            split};
  };
  const auto& arrays = append_arrays(dynamic);
  std::vector<Buffer> inputs, outputs;
  View before[schema::kAppendDynamic.result_count];
  for (int32_t i = 0; i < arrays.result_count; ++i) {
    Buffer& result = outputs.emplace_back(buffer_of(*arrays.results[i]));
    for (schema::Axis& axis : result.dims.axes) axis.may_be_one = false;  // every scale is written
    inputs.push_back(result);
    inputs.back().view = &before[i];
  }
  for (int32_t i = arrays.result_count; i < arrays.operand_count; ++i) {
    inputs.push_back(buffer_of(*arrays.operands[i]));
  }
  for (int32_t i = 0; i < static_cast<int32_t>(AppendOperand::kCount); ++i) {
    if (spec.has(static_cast<AppendOperand>(i))) inputs.push_back(buffer_of(schema::kAppendOptional[i]));
  }
  BufferDecoder buffers;
  buffers.take_float8_rows();
  if (ffi::Error e = buffers.decode(inputs, outputs, args, rets, p.leading); e.failure()) return e;
  p.dtype = buffers.dtype(Element::kActivation);
  p.pool_dtype = buffers.dtype(Element::kPool);
  static_cast<Sizes<int32_t>&>(p) = buffers.sizes();
  if (p.pool_dtype != p.dtype && !is_float8(p.pool_dtype)) {
    return operand_error("k_pages has a dtype that is neither key's nor float8");
  }
  bool computes = dynamic;
  for (AppendOperand x :
       {AppendOperand::kCos, AppendOperand::kSin, AppendOperand::kKScale, AppendOperand::kVScale})
    computes = computes || spec.has(x);
  if (is_float8(p.dtype) && (p.pool_dtype != p.dtype || computes)) {
    return operand_error("key of a float8 dtype is stored as it is, in a pool of that dtype");
  }
  if (dynamic &&
      (!is_float8(p.pool_dtype) || spec.has(AppendOperand::kKScale) || spec.has(AppendOperand::kVScale))) {
    return operand_error("dynamic scales are overwritten, and belong to float8 pools");
  }
  if (p.spec.has(AppendOperand::kCos) != p.spec.has(AppendOperand::kSin) ||
      2 * int64_t{p.rotated} > p.head_dim || (p.rotated > 0 && p.positions == 0)) {
    return operand_error(
        "cos and sin must come together, with a position, for at most the head dim's features");
  }
  return ffi::Error::Success();
}

}  // namespace jax_flash
