// The parts of the Python module that concern CUDA: opening its library, the kernel table and plans.
#pragma once

#include <nanobind/nanobind.h>

#include <string>

#include "core/plan/row.h"

namespace jax_flash {

void bind_cuda(nanobind::module_& module);
void bind_plan(nanobind::module_& module);

// The names of a row's bit sets, for Python.
nanobind::tuple names_of_dtypes(uint32_t dtypes);
nanobind::tuple names_of_loaders(uint32_t loaders);
nanobind::tuple names_of_scores(uint32_t scores);

// The dtypes for which the loaded library has a row of the table.
uint32_t built_dtypes(const KernelRow& row);

}  // namespace jax_flash
