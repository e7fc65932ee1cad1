// The operand tables of the custom calls, and their attributes: the C++ side of jax_flash/operands.py and
// spec.py.
#pragma once

#include <string>
#include <vector>

#include "../core/paging.h"
#include "../core/problem.h"
#include "buffers.h"
#include "xla/ffi/api/ffi.h"

XLA_FFI_REGISTER_ENUM_ATTR_DECODING(::jax_flash::Layout);
XLA_FFI_REGISTER_ENUM_ATTR_DECODING(::jax_flash::PageLayout);
XLA_FFI_REGISTER_ENUM_ATTR_DECODING(::jax_flash::Align);
XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    ::jax_flash::AttentionSpec, StructMember<::jax_flash::Layout>("layout"),
    StructMember<::jax_flash::Align>("align"), StructMember<int32_t>("left"), StructMember<int32_t>("right"),
    StructMember<float>("scale"), StructMember<float>("softcap"), StructMember<float>("dropout_rate"),
    StructMember<bool>("deterministic"), StructMember<int32_t>("operands"),
    StructMember<::jax_flash::PageLayout>("page_layout"), StructMember<int32_t>("num_splits"),
    StructMember<bool>("batch_invariant"), StructMember<int32_t>("value_dim"));
XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(::jax_flash::AppendSpec,
                                      StructMember<::jax_flash::PageLayout>("page_layout"),
                                      StructMember<bool>("interleaved"), StructMember<int32_t>("operands"));

namespace jax_flash {

// The axes of a per-token operand [b, s, h, width], or [t, h, width] when packed.
inline std::vector<Axis> token_axes(bool packed, Size rows, Size heads, Size width) {
  std::vector<Axis> axes{{rows, &View::row}, {heads, &View::head}, {width, &View::column}};
  if (!packed) axes.insert(axes.begin(), {Size::kBatch, &View::batch});
  return axes;
}

// The axes of a pool, [p, ps, hk, width] or [p, hk, ps, width].
inline std::vector<Axis> pool_axes(PageLayout layout, Size width) {
  const Axis slot{Size::kPageSize, &View::row}, head{Size::kKvHeads, &View::head};
  const bool nhd = layout == PageLayout::kNhd;
  return {{Size::kPages, &View::batch}, nhd ? slot : head, nhd ? head : slot, {width, &View::column}};
}

// The axes of a float8 pool's scales, [p, hk] or [1, hk].
inline std::vector<Axis> scale_axes() {
  return {{Size::kPages, &View::batch, true}, {Size::kKvHeads, &View::head}};
}

inline std::vector<Axis> table_axes() {
  return {{Size::kBatch, &View::batch}, {Size::kTable, &View::column}};
}

class OperandDecoder {
 public:
  OperandDecoder(Pass pass, const AttentionSpec& spec, Problem& problem, Tangents& tangents)
      : pass_(pass), problem_(problem), tangents_(tangents) {
    problem_ = Problem{};
    tangents_ = Tangents{};
    problem_.spec = spec;
    buffers_.set(Size::kDropout, 6);
    buffers_.set(Size::kPosition, 2);
    if (spec.value_dim > 0) buffers_.set(Size::kValueDim, spec.value_dim);
  }

  ffi::Error decode(ffi::RemainingArgs args, ffi::RemainingRets rets) {
    Problem& p = problem_;
    if (p.paged() && pass_ != Pass::kForward) {
      return operand_error("the derivatives of a paged layout are those of its gathered keys");
    }
    ffi::Error e = buffers_.decode(input_rows(), output_rows(), args, rets, p.leading);
    if (e.failure()) return e;
    p.dtype = buffers_.dtype(Element::kActivation);
    p.bias_dtype = buffers_.dtype(Element::kBias);
    p.kv_dtype = p.paged() ? buffers_.dtype(Element::kPool) : p.dtype;
    p.batch = buffers_.size(Size::kBatch);
    p.heads = buffers_.size(Size::kHeads);
    p.kv_heads = buffers_.size(Size::kKvHeads);
    p.head_dim = buffers_.size(Size::kHeadDim);
    p.value_dim = buffers_.size(Size::kValueDim);
    p.q_rows = buffers_.size(Size::kQRows);
    p.page_size = buffers_.size(Size::kPageSize);
    p.pages = buffers_.size(Size::kPages);
    p.table = buffers_.size(Size::kTable);
    p.draft_rows = buffers_.size(Size::kDraftRows);
    p.k_rows = p.paged() ? table_capacity(p.table, p.page_size) : buffers_.size(Size::kKRows);
    if (pass_ == Pass::kBiasGradient) read_dbias(rets);
    return check();
  }

 private:
  bool packed() const { return problem_.packed(); }

  std::vector<Axis> row_axes() const {
    std::vector<Axis> axes{{Size::kHeads, &View::head}, {Size::kQRows, &View::row}};
    if (!packed()) axes.insert(axes.begin(), {Size::kBatch, &View::batch});
    return axes;
  }

  std::vector<Axis> key_axes(Size width) const {
    if (problem_.paged()) return pool_axes(problem_.spec.page_layout, width);
    return token_axes(packed(), Size::kKRows, Size::kKvHeads, width);
  }

  std::vector<Axis> query_axes(Size width) const {
    return token_axes(packed(), Size::kQRows, Size::kHeads, width);
  }

  static std::vector<Axis> score_axes() {
    return {{Size::kBatch, &View::batch, true},
            {Size::kHeads, &View::head, true},
            {Size::kQRows, &View::row, true},
            {Size::kKRows, &View::column, true}};
  }

  std::vector<OperandRow> input_rows() {
    Problem& p = problem_;
    const Size value_width = p.spec.value_dim > 0 ? Size::kHeadDim : Size::kValueDim;
    const Element key_element = p.paged() ? Element::kPool : Element::kActivation;
    std::vector<OperandRow> rows{{"query", &p.query, Element::kActivation, query_axes(Size::kHeadDim)},
                                 {"key", &p.key, key_element, key_axes(Size::kHeadDim)},
                                 {"value", &p.value, key_element, key_axes(value_width)}};
    Tangents& t = tangents_;
    if (pass_ == Pass::kTangent) {
      rows.push_back({"out", &p.out, Element::kActivation, query_axes(Size::kValueDim)});
      rows.push_back({"lse", &p.lse, Element::kFloat32, row_axes()});
      rows.push_back({"tquery", &t.tquery, Element::kActivation, query_axes(Size::kHeadDim)});
      rows.push_back({"tkey", &t.tkey, Element::kActivation, key_axes(Size::kHeadDim)});
      rows.push_back({"tvalue", &t.tvalue, Element::kActivation, key_axes(Size::kValueDim)});
    } else if (pass_ != Pass::kForward) {
      rows.push_back({"dout", &p.dout, Element::kActivation, query_axes(Size::kValueDim)});
      rows.push_back({"lse", &p.lse, Element::kFloat32, row_axes()});
      rows.push_back({"delta", &p.delta, Element::kFloat32, row_axes()});
    }
    const std::vector<Axis> starts{{Size::kStarts, &View::batch}}, lengths{{Size::kBatch, &View::batch}};
    const std::vector<Axis> q_rows{{Size::kBatch, &View::batch}, {Size::kQRows, &View::row}};
    const std::vector<Axis> k_rows{{Size::kBatch, &View::batch}, {Size::kKRows, &View::row}};
    const std::vector<Axis> slopes{{Size::kBatch, &View::batch, true}, {Size::kHeads, &View::head}};
    const std::vector<Axis> drafts{{Size::kBatch, &View::batch, true},
                                   {Size::kDraftRows, &View::row},
                                   {Size::kDraftRows, &View::column}};
    const OperandRow optional[] = {
        // in the order of enum class Operand
        {"cu_seqlens_q", &p.cu_seqlens_q, Element::kInt32, starts},
        {"cu_seqlens_k", &p.cu_seqlens_k, Element::kInt32, starts},
        {"q_lengths", &p.q_lengths, Element::kInt32, lengths},
        {"kv_lengths", &p.kv_lengths, Element::kInt32, lengths},
        {"q_segment_ids", &p.q_segment_ids, Element::kInt32, q_rows},
        {"kv_segment_ids", &p.kv_segment_ids, Element::kInt32, k_rows},
        {"mask", &p.mask, Element::kBool, score_axes()},
        {"bias", &p.bias, Element::kBias, score_axes()},
        {"alibi_slopes", &p.alibi_slopes, Element::kFloat32, slopes},
        {"sinks", &p.sinks, Element::kFloat32, {{Size::kHeads, &View::head}}},
        {"dropout", &p.dropout, Element::kUInt32, {{Size::kDropout, &View::column}}},
        {"block_tables", &p.block_tables, Element::kInt32, table_axes()},
        {"k_scale", &p.k_scale, Element::kFloat32, scale_axes()},
        {"v_scale", &p.v_scale, Element::kFloat32, scale_axes()},
        {"position", &p.position, Element::kInt32, {{Size::kPosition, &View::column}}},
        {"tbias", &t.tbias, Element::kBias, score_axes()},
        {"draft_mask", &p.draft_mask, Element::kBool, drafts},
    };
    static_assert(std::size(optional) == static_cast<size_t>(Operand::kCount));
    for (size_t i = 0; i < std::size(optional); ++i) {
      if (p.spec.has(static_cast<Operand>(i))) rows.push_back(optional[i]);
    }
    return rows;
  }

  std::vector<OperandRow> output_rows() {
    Problem& p = problem_;
    switch (pass_) {
      case Pass::kForward:
      case Pass::kDecode:
        return {{"out", &p.out, Element::kActivation, query_axes(Size::kValueDim)},
                {"lse", &p.lse, Element::kFloat32, row_axes()}};
      case Pass::kBackward:
        return {{"dquery", &p.dquery, Element::kActivation, query_axes(Size::kHeadDim)},
                {"dkey", &p.dkey, Element::kActivation, key_axes(Size::kHeadDim)},
                {"dvalue", &p.dvalue, Element::kActivation, key_axes(Size::kValueDim)}};
      case Pass::kBiasGradient:
        return {{"dbias", &p.dbias, Element::kBias, score_axes()}};
      case Pass::kTangent:
        return {{"tout", &tangents_.tout, Element::kActivation, query_axes(Size::kValueDim)},
                {"tlse", &tangents_.tlse, Element::kFloat32, row_axes()}};
      case Pass::kAppend:  // has operands of its own
        break;
    }
    return {};
  }

  void read_dbias(ffi::RemainingRets rets) {
    const auto dims = (*rets.get<ffi::AnyBuffer>(0))->dimensions();
    int32_t* own[] = {&problem_.dbias_batch, &problem_.dbias_heads, &problem_.dbias_rows,
                      &problem_.dbias_columns};
    for (size_t i = 0; i < 4; ++i) *own[i] = static_cast<int32_t>(dims[dims.size() - 4 + i]);
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
    if (p.spec.value_dim > 0 && (!p.paged() || p.spec.value_dim > p.head_dim)) {
      return operand_error("value_dim is for pages, whose head dim is at least as large");
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

inline ffi::Error decode_operands(Pass pass, const AttentionSpec& spec, ffi::RemainingArgs args,
                                  ffi::RemainingRets rets, Problem& problem) {
  Tangents none;
  return OperandDecoder(pass, spec, problem, none).decode(args, rets);
}

inline ffi::Error decode_tangents(const AttentionSpec& spec, ffi::RemainingArgs args, ffi::RemainingRets rets,
                                  Problem& problem, Tangents& tangents) {
  return OperandDecoder(Pass::kTangent, spec, problem, tangents).decode(args, rets);
}

// A pool before and after append_kv.
inline ffi::Error same_bytes(ffi::AnyBuffer before, ffi::AnyBuffer after) {
  if (before.size_bytes() == after.size_bytes()) return ffi::Error::Success();
  return operand_error("a pool of append_kv has " + std::to_string(before.size_bytes()) +
                       " bytes, its result " + std::to_string(after.size_bytes()));
}

// Operands that append_kv overwrites: the pools and, if it keeps them, their scales. They come first.
inline size_t overwritten(bool dynamic) { return dynamic ? 4 : 2; }

// The views of what is overwritten are those of the results, which may be the operands' own memory.
inline ffi::Error decode_append(const AppendSpec& spec, bool dynamic, ffi::RemainingArgs args,
                                ffi::RemainingRets rets, AppendProblem& p) {
  p = AppendProblem{};
  p.spec = spec;
  p.dynamic = dynamic;
  const std::vector<Axis> angles{{Size::kPositions, &View::row}, {Size::kRotated, &View::column}};
  const std::vector<Axis> by_page{{Size::kPages, &View::batch}, {Size::kKvHeads, &View::head}};
  std::vector<OperandRow> outputs{
      {"k_pages", &p.k_pages, Element::kPool, pool_axes(spec.page_layout, Size::kHeadDim)},
      {"v_pages", &p.v_pages, Element::kPool, pool_axes(spec.page_layout, Size::kValueDim)}};
  if (dynamic) {
    outputs.push_back({"k_scale", &p.k_scale, Element::kFloat32, by_page});
    outputs.push_back({"v_scale", &p.v_scale, Element::kFloat32, by_page});
  }
  View before[4];
  std::vector<OperandRow> inputs = outputs;
  for (size_t i = 0; i < inputs.size(); ++i) inputs[i].view = &before[i];
  const OperandRow required[] = {
      {"key", &p.key, Element::kActivation,
       token_axes(p.packed(), Size::kQRows, Size::kKvHeads, Size::kHeadDim)},
      {"value", &p.value, Element::kActivation,
       token_axes(p.packed(), Size::kQRows, Size::kKvHeads, Size::kValueDim)},
      {"block_tables", &p.block_tables, Element::kInt32, table_axes()},
      {"kv_lengths", &p.kv_lengths, Element::kInt32, {{Size::kBatch, &View::batch}}}};
  inputs.insert(inputs.end(), std::begin(required), std::end(required));
  const OperandRow optional[] = {
      // in the order of enum class AppendOperand
      {"cu_seqlens", &p.cu_seqlens, Element::kInt32, {{Size::kStarts, &View::batch}}},
      {"cos", &p.cos, Element::kFloat32, angles},
      {"sin", &p.sin, Element::kFloat32, angles},
      {"k_scale", &p.k_scale, Element::kFloat32, scale_axes()},
      {"v_scale", &p.v_scale, Element::kFloat32, scale_axes()},
  };
  static_assert(std::size(optional) == static_cast<size_t>(AppendOperand::kCount));
  for (size_t i = 0; i < std::size(optional); ++i) {
    if (spec.has(static_cast<AppendOperand>(i))) inputs.push_back(optional[i]);
  }
  BufferDecoder buffers;
  if (ffi::Error e = buffers.decode(inputs, outputs, args, rets, p.leading); e.failure()) return e;
  p.dtype = buffers.dtype(Element::kActivation);
  p.pool_dtype = buffers.dtype(Element::kPool);
  p.batch = buffers.size(Size::kBatch);
  p.kv_heads = buffers.size(Size::kKvHeads);
  p.head_dim = buffers.size(Size::kHeadDim);
  p.value_dim = buffers.size(Size::kValueDim);
  p.rows = buffers.size(Size::kQRows);
  p.page_size = buffers.size(Size::kPageSize);
  p.pages = buffers.size(Size::kPages);
  p.table = buffers.size(Size::kTable);
  p.positions = buffers.size(Size::kPositions);
  p.rotated = buffers.size(Size::kRotated);
  if (p.pool_dtype != p.dtype && !is_float8(p.pool_dtype)) {
    return operand_error("k_pages has a dtype that is neither key's nor float8");
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
