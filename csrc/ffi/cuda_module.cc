#include "cuda_module.h"

#include <dlfcn.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "library.h"

namespace nb = nanobind;

namespace jax_flash {
namespace {

struct Handler {
  const char* target;  // the custom call's name
  const char* symbol;  // its name in the library
};
constexpr Handler kHandlers[] = {
#define JF_PASS(id, name, ...) {"jax_flash_" #name, "JaxFlash" #id "Cuda"},
#define JF_CUDA_PASS(id, name, ...) {"jax_flash_" #name, "JaxFlash" #id "Cuda"},
#define JF_APPEND_PASS(id, name, ...) {"jax_flash_" #name, "JaxFlash" #id "Cuda"},
#include "../results.def"
};

std::vector<KernelRow>& built_kernels() {
  static std::vector<KernelRow> rows;
  return rows;
}

template <class Function>
Function* find(void* library, const char* name, const std::string& path) {
  void* symbol = dlsym(library, name);
  if (!symbol) throw std::runtime_error(path + " has no " + name + ": not a jax_flash CUDA library");
  return reinterpret_cast<Function*>(symbol);
}

// Opens the library for the life of the process; returns the handlers that it has, by custom-call name.
nb::dict load_cuda(const std::string& path) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) throw std::runtime_error(dlerror());
  const std::string version = find<VersionFunction>(library, "jax_flash_version", path)();
  if (version != JAX_FLASH_VERSION) {
    throw std::runtime_error(path + " is version " + version + ", jax_flash is " JAX_FLASH_VERSION);
  }
  int32_t count = 0;
  const KernelRow* rows = find<KernelsFunction>(library, "jax_flash_kernels", path)(&count);
  built_kernels().assign(rows, rows + count);
  nb::dict handlers;
  for (const Handler& handler : kHandlers) {
    if (void* symbol = dlsym(library, handler.symbol)) handlers[handler.target] = nb::capsule(symbol);
  }
  return handlers;
}

// Whether two rows compute the same thing; their tiles may differ.
bool same_kernel(const KernelRow& a, const KernelRow& b) {
  return std::strcmp(a.arch->name, b.arch->name) == 0 && a.pass == b.pass && a.design == b.design &&
         a.head_dim == b.head_dim && a.value_dim == b.value_dim;
}

// The rows that were built, as (arch, pass, d, dv, dtypes, loaders, design); rows that differ only in tile
// shape or dtype are merged.
nb::list cuda_kernels() {
  std::vector<KernelRow> merged;
  for (const KernelRow& row : built_kernels()) {
    const auto at =
        std::find_if(merged.begin(), merged.end(), [&](auto& other) { return same_kernel(row, other); });
    if (at == merged.end()) {
      merged.push_back(row);
    } else {
      at->elements |= row.elements;
      at->loaders |= row.loaders;
    }
  }
  nb::list result;
  for (const KernelRow& row : merged) {
    result.append(nb::make_tuple(row.arch->name, name_of(row.pass), row.head_dim, row.value_dim,
                                 names_of_dtypes(row.elements), names_of_loaders(row.loaders),
                                 name_of(row.design)));
  }
  return result;
}

}  // namespace

uint32_t built_dtypes(const KernelRow& row) {
  uint32_t dtypes = 0;
  for (const KernelRow& other : built_kernels()) {
    if (same_kernel(row, other) && (row.loaders & other.loaders) && row.block_m == other.block_m &&
        row.block_n == other.block_n && row.stages == other.stages) {
      dtypes |= other.elements & row.elements;
    }
  }
  return dtypes;
}

void bind_cuda(nb::module_& module) {
  module.def("load_cuda", &load_cuda, nb::arg("path"));
  module.def("cuda_kernels", &cuda_kernels);
}

}  // namespace jax_flash
