// Exports of libjax_flash_cuda.so besides its FFI handlers; the module that opens the library looks them up
// by name.
#pragma once

#include <cstdint>

#include "core/plan/row.h"

namespace jax_flash {

using VersionFunction = const char*();  // jax_flash_version: must equal the module's
using KernelsFunction =
    const KernelRow*(int32_t* count);  // jax_flash_kernels: the rows built, one dtype each

}  // namespace jax_flash
