// Compiled once per instruction set, see isa.h and isa.cmake.
#include "isa.h"
// isa.h goes first: it makes the core force-inlined.
#include "backward.h"
#include "bias_gradient.h"
#include "forward.h"
#include "kernels.h"

#define JF_TEXT_(x) #x
#define JF_TEXT(x) JF_TEXT_(x)

namespace jax_flash::JF_ISA {

extern const Kernels kKernels{JF_TEXT(JF_ISA), kTileM,       kTileN,       forward,
                              backward_query,  backward_key, bias_gradient};

}  // namespace jax_flash::JF_ISA
