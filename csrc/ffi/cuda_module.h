// The part of the Python module that concerns CUDA: opening its library, the kernel table and plans.
#pragma once

#include <nanobind/nanobind.h>

namespace jax_flash {

void bind_cuda(nanobind::module_& module);

}  // namespace jax_flash
