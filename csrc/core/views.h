// Strided views of the operands: any number of leading batch dimensions, then dimensions with names.
#pragma once

#include <algorithm>
#include <cstdint>

#include "spec.h"

namespace jax_flash {

// Two adjacent leading dimensions are merged if every operand has both or broadcasts both, so few remain.
inline constexpr int kMaxLeading = 6;

// The leading dimensions L of a call, shared by all its operands.
struct Leading {
  int32_t rank = 0;
  int64_t size[kMaxLeading] = {};

  JF_HD int64_t count() const {
    int64_t n = 1;
#if defined(__CUDA_ARCH__)
#pragma unroll 1
#endif
    for (int i = 0; i < rank; ++i) n *= size[i];
    return n;
  }
};

// One operand or result. Strides are in elements; 0 where the operand is broadcast or has no such dimension.
// `batch` is the batch entry or the sequence, `row` a query or key position (a packed token with varlen),
// `column` the last dimension (features, keys of a mask, entries of a 1-D operand).
struct View {
  void* data = nullptr;
  int64_t leading[kMaxLeading] = {};
  int64_t batch = 0, head = 0, row = 0, column = 0;

  JF_HD explicit operator bool() const { return data != nullptr; }

  // Offset of leading entry `flat` in [0, Leading::count()).
  JF_HD int64_t leading_offset(const Leading& dims, int64_t flat) const {
    int64_t offset = 0;
#if defined(__CUDA_ARCH__)
#pragma unroll 1  // if the loop were unrolled, its divisions would fill the instruction cache
#endif
    for (int i = dims.rank - 1; i > 0; --i) {
      offset += flat % dims.size[i] * leading[i];
      flat /= dims.size[i];
    }
    return dims.rank > 0 ? offset + flat * leading[0] : 0;
  }

  // Whether its leading entries differ.
  bool leads(const Leading& dims) const {
    return std::any_of(leading, leading + dims.rank, [](int64_t stride) { return stride != 0; });
  }

  // Element offset from the start of one leading entry.
  JF_HD int64_t offset(int64_t b, int64_t h, int64_t i, int64_t j = 0) const {
    return b * batch + h * head + i * row + j * column;
  }

  template <class T>
  JF_HD T* as() const {
    return static_cast<T*>(data);
  }
};

JF_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace jax_flash
