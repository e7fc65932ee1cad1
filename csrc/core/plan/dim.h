// A size: a number or, in a program that is exported with symbolic sizes, an expression of JAX.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>

#include "core/sizes.h"

namespace jax_flash {

class Dim {
 public:
  enum class Op { kAdd, kMultiply, kFloorDivide, kMax, kMin };

  // An expression in symbolic sizes. Only the Python module implements it.
  struct Symbol {
    virtual ~Symbol() = default;
    virtual Dim apply(Op op, const Dim& left, const Dim& right) const = 0;
  };

  Dim(int64_t value = 0) : value_(value) {}
  explicit Dim(std::shared_ptr<const Symbol> symbol) : symbol_(std::move(symbol)) {}

  bool known() const { return !symbol_; }
  int64_t value() const { return value_; }  // only if it is a number
  const Symbol* symbol() const { return symbol_.get(); }

  friend Dim operator+(const Dim& a, const Dim& b) { return combine(Op::kAdd, a, b); }
  friend Dim operator*(const Dim& a, const Dim& b) { return combine(Op::kMultiply, a, b); }
  friend Dim operator/(const Dim& a, const Dim& b) { return combine(Op::kFloorDivide, a, b); }
  friend Dim max(const Dim& a, const Dim& b) { return combine(Op::kMax, a, b); }
  friend Dim min(const Dim& a, const Dim& b) { return combine(Op::kMin, a, b); }

 private:
  static Dim combine(Op op, const Dim& a, const Dim& b) {
    if (a.symbol_) return a.symbol_->apply(op, a, b);
    if (b.symbol_) return b.symbol_->apply(op, a, b);
    switch (op) {
      case Op::kAdd:
        return a.value_ + b.value_;
      case Op::kMultiply:
        return a.value_ * b.value_;
      case Op::kFloorDivide:
        return a.value_ / b.value_;
      case Op::kMax:
        return std::max(a.value_, b.value_);
      case Op::kMin:
        return std::min(a.value_, b.value_);
    }
    return 0;
  }

  int64_t value_ = 0;
  std::shared_ptr<const Symbol> symbol_;
};

// How much of a boolean mask is stored: the number of its [rows, keys] arrays, and their sizes. A size is 1
// where the mask is broadcast, but all leading entries count if the mask has any of the leading dimensions.
template <class T>
struct MaskSizes {
  T arrays{}, rows{}, keys{};

  bool operator==(const MaskSizes&) const = default;
};

// Input of a workspace bound.
struct DimShapes : Sizes<Dim> {
  Dim leading;  // product of the leading dimensions
  MaskSizes<Dim> mask;
};

}  // namespace jax_flash
