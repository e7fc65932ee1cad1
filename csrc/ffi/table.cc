#include "table.h"

namespace jax_flash {
namespace {

constexpr uint32_t bit(DType dtype) { return 1u << static_cast<int32_t>(dtype); }

enum Family { sm75 = 75, sm80 = 80, sm90 = 90 };
constexpr Pass forward = Pass::kForward, backward = Pass::kBackward, bias_gradient = Pass::kBiasGradient,
               paged_forward = Pass::kPagedForward, decode = Pass::kDecode;
constexpr uint32_t half = bit(DType::kF16) | bit(DType::kBF16), float16 = bit(DType::kF16),
                   single = bit(DType::kF32);

constexpr KernelRow kTable[] = {
#define JF_KERNEL(family, pass, dtypes, ...) {#family, family, pass, dtypes, __VA_ARGS__},
#define JF_FALLBACK JF_KERNEL
#include "kernels.def"
#undef JF_FALLBACK
#undef JF_KERNEL
};

}  // namespace

std::span<const KernelRow> kernel_table() { return kTable; }

}  // namespace jax_flash
