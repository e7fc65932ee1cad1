// csrc/kernels.def as data, and the C interface of libjax_flash_cuda.so.
#pragma once

#include <cstdint>
#include <span>

#include "core/plan.h"

namespace jax_flash {

// Every row of the table, built or not.
std::span<const KernelRow> kernel_table();

// What the CUDA library exports beside its FFI handlers; the module that opens it looks these up by name.
using VersionFunction = const char*();  // jax_flash_version: must equal the module's
using KernelsFunction =
    const KernelRow*(int32_t* count);  // jax_flash_kernels: the rows built, one dtype each

}  // namespace jax_flash
