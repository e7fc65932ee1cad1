#include "registry.h"

#include "core/table.h"

namespace jax_flash {

#define JF_BUILT(launch, arch, ...) Launch launch;
#include "built_kernels.def"
#undef JF_BUILT

namespace {

using namespace columns;

constexpr KernelRow kRows[] = {
#define JF_BUILT(launch, arch, ...) {{__VA_ARGS__}, &arches::arch},
#include "built_kernels.def"
#undef JF_BUILT
};

constexpr Launch* kLaunches[] = {
#define JF_BUILT(launch, arch, ...) launch,
#include "built_kernels.def"
#undef JF_BUILT
};

}  // namespace

std::span<const KernelRow> built_kernels() { return kRows; }

Launch* launch_of(int32_t kernel) { return kLaunches[kernel]; }

}  // namespace jax_flash
