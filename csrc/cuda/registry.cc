#include "registry.h"

#include "core/table.h"

namespace jax_flash {

#define JF_BUILT(launch, arch, ...) Launch launch;
#define JF_BUILT_APPEND(launch, arch, ...) AppendLaunch launch;
#include "built_kernels.def"
#undef JF_BUILT_APPEND
#undef JF_BUILT

namespace {

using namespace columns;

constexpr KernelRow kRows[] = {
#define JF_BUILT(launch, arch, ...) {{__VA_ARGS__}, &arches::arch},
#define JF_BUILT_APPEND JF_BUILT
#include "built_kernels.def"
#undef JF_BUILT_APPEND
#undef JF_BUILT
};

// The launch function of a row, by its pass.
struct AnyLaunch {
  Launch* attention;
  AppendLaunch* append;
};
constexpr AnyLaunch kLaunches[] = {
#define JF_BUILT(launch, arch, ...) {launch, nullptr},
#define JF_BUILT_APPEND(launch, arch, ...) {nullptr, launch},
#include "built_kernels.def"
#undef JF_BUILT_APPEND
#undef JF_BUILT
};

}  // namespace

std::span<const KernelRow> built_kernels() { return kRows; }

Launch* launch_of(int32_t kernel) { return kLaunches[kernel].attention; }
AppendLaunch* append_launch_of(int32_t kernel) { return kLaunches[kernel].append; }

}  // namespace jax_flash
