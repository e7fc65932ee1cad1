// csrc/kernels.def as data.
#pragma once

#include <span>

#include "core/plan/columns.h"
#include "core/plan/family.h"

namespace jax_flash {

// The families that the arches name; each is defined in csrc/core/families/<family>.cc.
namespace families {
#define JF_KERNEL(...)
#define JF_FALLBACK(...)
#define JF_ARCH(arch, family, ...) const Family& family();
#include "kernels.def"
#undef JF_ARCH
}  // namespace families

namespace arches {
using columns::any;
#define JF_ARCH(arch, family, oldest, newest, ...) \
  inline constexpr Arch arch{#arch, oldest, newest, &families::family};
#include "kernels.def"
#undef JF_ARCH
#undef JF_FALLBACK
#undef JF_KERNEL
}  // namespace arches

// Every arch, and every row, built or not.
std::span<const Arch* const> arch_table();
std::span<const KernelRow> kernel_table();

}  // namespace jax_flash
