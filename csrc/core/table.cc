#include "core/table.h"

namespace jax_flash {
namespace {

using namespace columns;

constexpr const Arch* kArches[] = {
#define JF_KERNEL(...)
#define JF_FALLBACK(...)
#define JF_ARCH(arch, ...) &arches::arch,
#include "kernels.def"
#undef JF_ARCH
#undef JF_FALLBACK
#undef JF_KERNEL
};

constexpr KernelRow kTable[] = {
#define JF_ARCH(...)
#define JF_KERNEL(arch, ...) {{__VA_ARGS__}, &arches::arch},
#define JF_FALLBACK JF_KERNEL
#include "kernels.def"
#undef JF_FALLBACK
#undef JF_KERNEL
#undef JF_ARCH
};

}  // namespace

std::span<const Arch* const> arch_table() { return kArches; }
std::span<const KernelRow> kernel_table() { return kTable; }

}  // namespace jax_flash
