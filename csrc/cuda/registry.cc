#include "registry.h"

namespace jax_flash {

#define JF_BUILT(family, pass, dtype, d, dv, m, n, stages, warps, blocks, launch) Launch launch;
#include "built_kernels.def"
#undef JF_BUILT

namespace {

enum Family { sm75 = 75, sm80 = 80, sm90 = 90 };
constexpr Pass forward = Pass::kForward, backward = Pass::kBackward, bias_gradient = Pass::kBiasGradient,
               paged_forward = Pass::kPagedForward, decode = Pass::kDecode;
enum DTypeBit { float16 = 1, bfloat16 = 2, float32 = 4 };

constexpr KernelRow kRows[] = {
#define JF_BUILT(family, pass, dtype, d, dv, m, n, stages, warps, blocks, launch) \
  {#family, family, pass, dtype, d, dv, m, n, stages, warps, blocks},
#include "built_kernels.def"
#undef JF_BUILT
};

constexpr Launch* kLaunches[] = {
#define JF_BUILT(family, pass, dtype, d, dv, m, n, stages, warps, blocks, launch) launch,
#include "built_kernels.def"
#undef JF_BUILT
};

}  // namespace

std::span<const KernelRow> built_kernels() { return kRows; }

Launch* launch_of(int32_t kernel) { return kLaunches[kernel]; }

}  // namespace jax_flash
