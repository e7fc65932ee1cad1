#include "registry.h"

#include "core/table.h"

namespace jax_flash {

#define JF_BUILT(arch, pass, loader, dtype, d, dv, m, n, stages, warps, teams, cluster, blocks, scores, \
                 launch)                                                                                \
  Launch launch;
#include "built_kernels.def"
#undef JF_BUILT

namespace {

using namespace columns;

constexpr KernelRow kRows[] = {
#define JF_BUILT(arch, pass, loader, dtype, d, dv, m, n, stages, warps, teams, cluster, blocks, scores, \
                 launch)                                                                                \
  {&arches::arch, pass, loader, dtype, d, dv, m, n, stages, warps, teams, cluster, blocks, scores},
#include "built_kernels.def"
#undef JF_BUILT
};

constexpr Launch* kLaunches[] = {
#define JF_BUILT(arch, pass, loader, dtype, d, dv, m, n, stages, warps, teams, cluster, blocks, scores, \
                 launch)                                                                                \
  launch,
#include "built_kernels.def"
#undef JF_BUILT
};

}  // namespace

std::span<const KernelRow> built_kernels() { return kRows; }

Launch* launch_of(int32_t kernel) { return kLaunches[kernel]; }

}  // namespace jax_flash
