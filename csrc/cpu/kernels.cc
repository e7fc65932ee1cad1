// The function table of one instruction set. This file is compiled once per instruction set (isa.h,
// isa.cmake).
#include "isa.h"
// isa.h goes first: it makes the core force-inlined.
#include "append.h"
#include "backward.h"
#include "bias_gradient.h"
#include "forward.h"
#include "kernels.h"
#include "tangent.h"

#define JF_TEXT_(x) #x
#define JF_TEXT(x) JF_TEXT_(x)

namespace jax_flash::JF_ISA {

extern const Kernels kKernels{.isa = JF_TEXT(JF_ISA),
                              .tile_m = kTileM,
                              .forward = forward,
                              .gradient_m = kGradientM,
                              .gradient_n = kGradientN,
                              .query_tile_floats = query_tile_floats,
                              .key_tile_floats = key_tile_floats,
                              .backward = backward,
                              .bias_gradient = bias_gradient,
                              .tangent_tiles = tangent_tiles,
                              .tangent = tangent,
                              .part_floats = part_floats,
                              .forward_part = forward_part,
                              .merge_parts = merge_parts,
                              .store_part = store_part,
                              .append = append};

}  // namespace jax_flash::JF_ISA
