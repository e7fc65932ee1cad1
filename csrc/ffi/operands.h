// Decodes the buffers of a custom call into a Problem: the C++ side of jax_flash/operands.py.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "../core/problem.h"
#include "xla/ffi/api/ffi.h"

XLA_FFI_REGISTER_ENUM_ATTR_DECODING(::jax_flash::Layout);
XLA_FFI_REGISTER_ENUM_ATTR_DECODING(::jax_flash::Align);
XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(::jax_flash::AttentionSpec, StructMember<::jax_flash::Layout>("layout"),
                                      StructMember<::jax_flash::Align>("align"),
                                      StructMember<int32_t>("left"), StructMember<int32_t>("right"),
                                      StructMember<float>("scale"), StructMember<float>("softcap"),
                                      StructMember<float>("dropout_rate"),
                                      StructMember<bool>("deterministic"), StructMember<int32_t>("operands"));

namespace jax_flash {

namespace ffi = ::xla::ffi;

// The sizes that the dimensions of the table have to agree on.
enum class Size : int32_t {
  kBatch,
  kHeads,
  kKvHeads,
  kQRows,
  kKRows,
  kHeadDim,
  kValueDim,
  kStarts,
  kDropout,
  kCount
};

struct Axis {
  Size size;
  int64_t View::* stride;
  bool may_be_one = false;
};

enum class Element { kActivation, kFloat32, kInt32, kUInt32, kBool, kBias };

// A row of the operand table.
struct OperandRow {
  const char* name;
  View Problem::* view;
  Element element;
  std::vector<Axis> axes;
};

class OperandDecoder {
 public:
  OperandDecoder(Pass pass, const AttentionSpec& spec, Problem& problem) : pass_(pass), problem_(problem) {
    problem_ = Problem{};
    problem_.spec = spec;
    sizes_.fill(-1);
    sizes_[static_cast<int>(Size::kDropout)] = 6;
  }

  // Results past those of the pass (a workspace) are left to the caller.
  ffi::Error decode(ffi::RemainingArgs args, ffi::RemainingRets rets) {
    const std::vector<OperandRow> inputs = input_rows(), outputs = output_rows();
    if (args.size() != inputs.size() || rets.size() < outputs.size()) {
      return error("the call has " + std::to_string(args.size()) + " operands and " +
                   std::to_string(rets.size()) + " results, its spec asks for " +
                   std::to_string(inputs.size()) + " and " + std::to_string(outputs.size()));
    }
    auto full = rets.get<ffi::AnyBuffer>(0);
    if (!full) return full.error();
    const size_t inner = outputs[0].axes.size();
    const auto dims = (*full)->dimensions();
    if (dims.size() < inner)
      return error(std::string(outputs[0].name) + " has rank " + std::to_string(dims.size()));
    leading_.assign(dims.begin(), dims.end() - inner);
    for (size_t i = 0; i < inputs.size(); ++i) {
      auto buffer = args.get<ffi::AnyBuffer>(i);
      if (!buffer) return buffer.error();
      if (ffi::Error e = read(inputs[i], *buffer, false); e.failure()) return e;
    }
    for (size_t i = 0; i < outputs.size(); ++i) {
      auto buffer = rets.get<ffi::AnyBuffer>(i);
      if (!buffer) return buffer.error();
      if (ffi::Error e = read(outputs[i], **buffer, true); e.failure()) return e;
    }
    return finish();
  }

 private:
  // The axes of a per-token operand [b, s, h, width], or [t, h, width] with varlen.
  std::vector<Axis> token_axes(Size rows, Size heads, Size width) const {
    std::vector<Axis> axes{{rows, &View::row}, {heads, &View::head}, {width, &View::column}};
    if (!problem_.varlen()) axes.insert(axes.begin(), {Size::kBatch, &View::batch});
    return axes;
  }

  std::vector<Axis> row_axes() const {
    std::vector<Axis> axes{{Size::kHeads, &View::head}, {Size::kQRows, &View::row}};
    if (!problem_.varlen()) axes.insert(axes.begin(), {Size::kBatch, &View::batch});
    return axes;
  }

  static std::vector<Axis> score_axes() {
    return {{Size::kBatch, &View::batch, true},
            {Size::kHeads, &View::head, true},
            {Size::kQRows, &View::row, true},
            {Size::kKRows, &View::column, true}};
  }

  std::vector<OperandRow> input_rows() const {
    using P = Problem;
    const auto query = token_axes(Size::kQRows, Size::kHeads, Size::kHeadDim);
    const auto key = token_axes(Size::kKRows, Size::kKvHeads, Size::kHeadDim);
    const auto value = token_axes(Size::kKRows, Size::kKvHeads, Size::kValueDim);
    std::vector<OperandRow> rows{{"query", &P::query, Element::kActivation, query},
                                 {"key", &P::key, Element::kActivation, key},
                                 {"value", &P::value, Element::kActivation, value}};
    if (pass_ != Pass::kForward) {
      const auto out = token_axes(Size::kQRows, Size::kHeads, Size::kValueDim);
      rows.push_back({"dout", &P::dout, Element::kActivation, out});
      rows.push_back({"lse", &P::lse, Element::kFloat32, row_axes()});
      rows.push_back({"delta", &P::delta, Element::kFloat32, row_axes()});
    }
    const std::vector<Axis> starts{{Size::kStarts, &View::batch}}, lengths{{Size::kBatch, &View::batch}};
    const OperandRow optional[] = {
        // in the order of enum class Operand
        {"cu_seqlens_q", &P::cu_seqlens_q, Element::kInt32, starts},
        {"cu_seqlens_k", &P::cu_seqlens_k, Element::kInt32, starts},
        {"q_lengths", &P::q_lengths, Element::kInt32, lengths},
        {"kv_lengths", &P::kv_lengths, Element::kInt32, lengths},
        {"q_segment_ids",
         &P::q_segment_ids,
         Element::kInt32,
         {{Size::kBatch, &View::batch}, {Size::kQRows, &View::row}}},
        {"kv_segment_ids",
         &P::kv_segment_ids,
         Element::kInt32,
         {{Size::kBatch, &View::batch}, {Size::kKRows, &View::row}}},
        {"mask", &P::mask, Element::kBool, score_axes()},
        {"bias", &P::bias, Element::kBias, score_axes()},
        {"alibi_slopes",
         &P::alibi_slopes,
         Element::kFloat32,
         {{Size::kBatch, &View::batch, true}, {Size::kHeads, &View::head}}},
        {"sinks", &P::sinks, Element::kFloat32, {{Size::kHeads, &View::head}}},
        {"dropout", &P::dropout, Element::kUInt32, {{Size::kDropout, &View::column}}},
    };
    static_assert(std::size(optional) == static_cast<size_t>(Operand::kCount));
    for (size_t i = 0; i < std::size(optional); ++i) {
      if (problem_.spec.has(static_cast<Operand>(i))) rows.push_back(optional[i]);
    }
    return rows;
  }

  std::vector<OperandRow> output_rows() const {
    using P = Problem;
    switch (pass_) {
      case Pass::kForward:
        return {
            {"out", &P::out, Element::kActivation, token_axes(Size::kQRows, Size::kHeads, Size::kValueDim)},
            {"lse", &P::lse, Element::kFloat32, row_axes()}};
      case Pass::kBackward:
        return {{"dquery", &P::dquery, Element::kActivation,
                 token_axes(Size::kQRows, Size::kHeads, Size::kHeadDim)},
                {"dkey", &P::dkey, Element::kActivation,
                 token_axes(Size::kKRows, Size::kKvHeads, Size::kHeadDim)},
                {"dvalue", &P::dvalue, Element::kActivation,
                 token_axes(Size::kKRows, Size::kKvHeads, Size::kValueDim)}};
      case Pass::kBiasGradient:
        return {{"dbias", &P::dbias, Element::kBias, score_axes()}};
    }
    return {};
  }

  ffi::Error read(const OperandRow& row, ffi::AnyBuffer buffer, bool result) {
    const auto dims = buffer.dimensions();
    const size_t rank = leading_.size() + row.axes.size();
    if (dims.size() != rank) {
      return error(std::string(row.name) + " has shape " + shape(dims) + ", its rank must be " +
                   std::to_string(rank));
    }
    if (!check_element(row, buffer.element_type())) {
      return error(std::string(row.name) + " has an element type that this call does not take");
    }
    View& view = problem_.*row.view;
    view.data = buffer.untyped_data();
    int64_t stride = 1;
    for (size_t i = row.axes.size(); i-- > 0;) {
      const Axis& axis = row.axes[i];
      const int64_t n = dims[leading_.size() + i];
      if (!agree(axis, n))
        return error(std::string(row.name) + " has shape " + shape(dims) + ", unlike the others");
      view.*axis.stride = axis.may_be_one && n == 1 ? 0 : stride;
      stride *= n;
    }
    std::vector<int64_t>& strides = strides_.emplace_back(leading_.size());
    views_.push_back(row.view);
    for (size_t i = leading_.size(); i-- > 0;) {
      if (dims[i] != leading_[i] && (result || dims[i] != 1)) {
        return error(std::string(row.name) + " has shape " + shape(dims) +
                     ", unlike the others' leading dimensions");
      }
      strides[i] = dims[i] == 1 ? 0 : stride;
      stride *= dims[i];
    }
    if (row.view == &Problem::dbias) {
      int32_t* own[] = {&problem_.dbias_batch, &problem_.dbias_heads, &problem_.dbias_rows,
                        &problem_.dbias_columns};
      for (size_t i = 0; i < 4; ++i) *own[i] = static_cast<int32_t>(dims[leading_.size() + i]);
    }
    return ffi::Error::Success();
  }

  // The first operand to name a size decides it.
  bool agree(const Axis& axis, int64_t n) {
    if (n > std::numeric_limits<int32_t>::max()) return false;
    int64_t& size = sizes_[static_cast<int>(axis.size)];
    if (axis.may_be_one && n == 1) return true;
    if (size < 0) {
      size = n;
      if (axis.size == Size::kStarts) sizes_[static_cast<int>(Size::kBatch)] = n - 1;
    }
    return size == n && !(axis.size == Size::kStarts && n < 1);
  }

  bool check_element(const OperandRow& row, ffi::DataType type) {
    switch (row.element) {
      case Element::kFloat32:
        return type == ffi::F32;
      case Element::kInt32:
        return type == ffi::S32;
      case Element::kUInt32:
        return type == ffi::U32;
      case Element::kBool:
        return type == ffi::PRED;
      default:
        break;
    }
    DType& known = row.element == Element::kBias ? problem_.bias_dtype : problem_.dtype;
    const bool first = row.view == &Problem::query || row.view == &Problem::bias;
    DType got;
    switch (type) {
      case ffi::F16:
        got = DType::kF16;
        break;
      case ffi::BF16:
        got = DType::kBF16;
        break;
      case ffi::F32:
        got = DType::kF32;
        break;
      default:
        return false;
    }
    if (first) known = got;
    return known == got;
  }

  ffi::Error finish() {
    auto size = [&](Size s) {
      return static_cast<int32_t>(std::max<int64_t>(sizes_[static_cast<int>(s)], 0));
    };
    Problem& p = problem_;
    p.batch = size(Size::kBatch);
    p.heads = size(Size::kHeads);
    p.kv_heads = size(Size::kKvHeads);
    p.head_dim = size(Size::kHeadDim);
    p.value_dim = size(Size::kValueDim);
    p.q_rows = size(Size::kQRows);
    p.k_rows = size(Size::kKRows);
    if (p.heads > 0 && (p.kv_heads == 0 || p.heads % p.kv_heads != 0)) {
      return error("key has " + std::to_string(p.kv_heads) + " heads, which does not divide query's " +
                   std::to_string(p.heads));
    }
    if (p.varlen() && !(p.spec.has(Operand::kCuSeqlensQ) && p.spec.has(Operand::kCuSeqlensK))) {
      return error("cu_seqlens_q and cu_seqlens_k are needed by the varlen layout");
    }
    if (pass_ == Pass::kBiasGradient && !p.spec.has(Operand::kBias)) return error("bias is missing");
    if (p.spec.dropout_rate > 0 && !p.spec.has(Operand::kDropout)) return error("dropout is missing");
    return merge_leading();
  }

  // Drops leading dimensions of size 1 and merges neighbours that all operands step through alike.
  ffi::Error merge_leading() {
    std::vector<size_t> last;  // the innermost raw dimension of each merged one
    std::vector<int64_t> merged;
    for (size_t i = 0; i < leading_.size(); ++i) {
      if (leading_[i] == 1) continue;
      const bool alike = !last.empty() && std::all_of(strides_.begin(), strides_.end(), [&](const auto& s) {
        return s[last.back()] == s[i] * leading_[i];
      });
      if (alike) {
        last.back() = i;
        merged.back() *= leading_[i];
      } else {
        last.push_back(i);
        merged.push_back(leading_[i]);
      }
    }
    if (merged.size() > kMaxLeading) {
      return error("the call has " + std::to_string(merged.size()) +
                   " batch dimensions that cannot be merged, at most " + std::to_string(kMaxLeading) +
                   " are supported: broadcast or reshape some before the call");
    }
    problem_.leading.rank = static_cast<int32_t>(merged.size());
    std::copy(merged.begin(), merged.end(), problem_.leading.size);
    for (size_t v = 0; v < views_.size(); ++v) {
      for (size_t i = 0; i < merged.size(); ++i) (problem_.*views_[v]).leading[i] = strides_[v][last[i]];
    }
    return ffi::Error::Success();
  }

  static std::string shape(ffi::AnyBuffer::Dimensions dims) {
    std::string text = "[";
    for (size_t i = 0; i < dims.size(); ++i) text += (i ? ", " : "") + std::to_string(dims[i]);
    return text + "]";
  }

  static ffi::Error error(const std::string& message) {
    return ffi::Error::InvalidArgument("jax_flash: " + message);
  }

  Pass pass_;
  Problem& problem_;
  std::array<int64_t, static_cast<size_t>(Size::kCount)> sizes_;
  std::vector<int64_t> leading_;
  std::vector<std::vector<int64_t>> strides_;  // leading strides of each of views_
  std::vector<View Problem::*> views_;
};

inline ffi::Error decode_operands(Pass pass, const AttentionSpec& spec, ffi::RemainingArgs args,
                                  ffi::RemainingRets rets, Problem& problem) {
  return OperandDecoder(pass, spec, problem).decode(args, rets);
}

}  // namespace jax_flash
