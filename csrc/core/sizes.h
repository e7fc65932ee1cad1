// The sizes of a call (csrc/operands.def): int32_t in kernels, int64_t in plans, and Dim in programs that are
// exported with symbolic sizes.
#pragma once

#include <cstdint>

namespace jax_flash {

template <class T>
struct Sizes {
#define JF_SIZE(name) T name{};
#include "../operands.def"

  bool operator==(const Sizes&) const = default;

  // The same sizes in another type.
  template <class U>
  Sizes<U> as() const {
    Sizes<U> sizes;
#define JF_SIZE(name) sizes.name = static_cast<U>(name);
#include "../operands.def"
    return sizes;
  }
};

}  // namespace jax_flash
