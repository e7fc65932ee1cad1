// Decodes the buffers of a custom call into views. All calls' operand tables share this code.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "../core/schema.h"
#include "xla/ffi/api/ffi.h"

namespace jax_flash {

namespace ffi = ::xla::ffi;

// One buffer of a call: the destination of its view, and its row of the table.
struct Buffer {
  View* view;
  const char* name;
  Element element;
  schema::Dims dims;
  bool split_columns = false;  // the last dimension is stored as two

  size_t rank() const { return static_cast<size_t>(dims.rank) + split_columns; }
};

inline ffi::Error operand_error(const std::string& message) {
  return ffi::Error::InvalidArgument("jax_flash: " + message);
}

inline std::string shape_text(ffi::AnyBuffer::Dimensions dims) {
  std::string text = "[";
  for (size_t i = 0; i < dims.size(); ++i) text += (i ? ", " : "") + std::to_string(dims[i]);
  return text + "]";
}

class BufferDecoder {
 public:
  // Fills the views. The caller handles further results that the table does not have (a workspace).
  ffi::Error decode(const std::vector<Buffer>& inputs, const std::vector<Buffer>& outputs,
                    ffi::RemainingArgs args, ffi::RemainingRets rets, Leading& leading) {
    if (args.size() != inputs.size() || rets.size() < outputs.size()) {
      return operand_error("the call has " + std::to_string(args.size()) + " operands and " +
                           std::to_string(rets.size()) + " results, its spec asks for " +
                           std::to_string(inputs.size()) + " and " + std::to_string(outputs.size()));
    }
    const size_t count = inputs.size() + outputs.size();
    views_.reserve(count), strides_.reserve(count), decided_.reserve(schema::Dims::kMost * count);
    auto full = rets.get<ffi::AnyBuffer>(0);
    if (!full) return full.error();
    const size_t inner = outputs[0].rank();
    const auto dims = (*full)->dimensions();
    if (dims.size() < inner)
      return operand_error(std::string(outputs[0].name) + " has rank " + std::to_string(dims.size()));
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
    return merge_leading(leading);
  }

  // Allows float8 for rows of the activation's dtype.
  void take_float8_rows() { takes_float8_rows_ = true; }

  void set_value_dim(int64_t n) { decide(&Sizes<int64_t>::value_dim, n); }

  // A size is 0 if no operand has the dimension.
  Sizes<int32_t> sizes() const { return sizes_.as<int32_t>(); }

  // kF16 if the call has no such operand.
  DType dtype(Element element) const { return dtypes_[static_cast<int>(element)]; }

 private:
  ffi::Error read(const Buffer& row, ffi::AnyBuffer buffer, bool result) {
    const auto dims = buffer.dimensions();
    const size_t rank = leading_.size() + row.rank();
    const auto error = [&](const std::string& what) { return operand_error(row.name + what); };
    if (dims.size() != rank) {
      return error(" has shape " + shape_text(dims) + ", its rank must be " + std::to_string(rank));
    }
    if (!check_element(row.element, buffer.element_type())) {
      return error(" has an element type that this call does not take");
    }
    View& view = *row.view;
    view.data = buffer.untyped_data();
    int64_t stride = 1;
    for (size_t i = row.dims.rank; i-- > 0;) {
      const schema::Axis& axis = row.dims.axes[i];
      const int64_t last = i + 1 == static_cast<size_t>(row.dims.rank) && row.split_columns ? dims.back() : 1;
      const int64_t n = dims[leading_.size() + i] * last;
      if (!agree(axis, n) && (result || !is_padded(row, axis, n)))
        return error(" has shape " + shape_text(dims) + ", unlike the others");
      view.*axis.stride = axis.may_be_one && n == 1 ? 0 : stride;
      stride *= n;
    }
    std::vector<int64_t>& strides = strides_.emplace_back(leading_.size());
    views_.push_back(row.view);
    for (size_t i = leading_.size(); i-- > 0;) {
      if (dims[i] != leading_[i] && (result || dims[i] != 1)) {
        return error(" has shape " + shape_text(dims) + ", unlike the others' leading dimensions");
      }
      strides[i] = dims[i] == 1 ? 0 : stride;
      stride *= dims[i];
    }
    return ffi::Error::Success();
  }

  // The first operand to name a size decides it.
  bool agree(const schema::Axis& axis, int64_t n) {
    if (axis.may_be_one && n == 1) return true;
    if (!axis.size) return n == axis.more;
    return axis.more <= n && n <= std::numeric_limits<int32_t>::max() && decide(axis.size, n - axis.more);
  }

  // Rows of a bias may be padded to a multiple of 8 keys, so that kernels can load 8 at a time.
  bool is_padded(const Buffer& row, const schema::Axis& axis, int64_t n) const {
    return row.element == Element::kBias && axis.size == &Sizes<int64_t>::k_rows &&
           n == ceil_div(sizes_.k_rows, 8) * 8;
  }

  bool decide(int64_t Sizes<int64_t>::* size, int64_t n) {
    const bool is_new = std::find(decided_.begin(), decided_.end(), size) == decided_.end();
    if (is_new) {
      decided_.push_back(size);
      sizes_.*size = n;
    }
    return sizes_.*size == n;
  }

  bool check_element(Element element, ffi::DataType type) {
    switch (element) {
      case Element::kFloat32:
        return type == ffi::F32;
      case Element::kInt32:
        return type == ffi::S32;
      case Element::kUInt32:
        return type == ffi::U32;
      case Element::kBoolean:
        return type == ffi::PRED;
      default:
        break;
    }
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
      case ffi::F8E4M3FN:
      case ffi::F8E5M2:
        if (element != Element::kPool && !takes_float8_rows_) return false;
        got = type == ffi::F8E5M2 ? DType::kF8E5M2 : DType::kF8E4M3;
        break;
      default:
        return false;
    }
    const int kind = static_cast<int>(element);
    if (!known_[kind]) dtypes_[kind] = got;
    known_[kind] = true;
    return dtypes_[kind] == got;
  }

  // Drops leading dimensions of size 1, and merges neighbouring ones that are contiguous, or broadcast, in
  // every operand.
  ffi::Error merge_leading(Leading& leading) {
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
      return operand_error("the call has " + std::to_string(merged.size()) +
                           " batch dimensions that cannot be merged, at most " + std::to_string(kMaxLeading) +
                           " are supported: broadcast or reshape some before the call");
    }
    leading.rank = static_cast<int32_t>(merged.size());
    std::copy(merged.begin(), merged.end(), leading.size);
    for (size_t v = 0; v < views_.size(); ++v) {
      for (size_t i = 0; i < merged.size(); ++i) views_[v]->leading[i] = strides_[v][last[i]];
    }
    return ffi::Error::Success();
  }

  Sizes<int64_t> sizes_;
  std::vector<int64_t Sizes<int64_t>::*> decided_;
  DType dtypes_[3] = {};
  bool known_[3] = {}, takes_float8_rows_ = false;
  std::vector<int64_t> leading_;
  std::vector<std::vector<int64_t>> strides_;  // leading strides of each of views_
  std::vector<View*> views_;
};

}  // namespace jax_flash
