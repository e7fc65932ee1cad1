// The Python module jax_flash._core: the custom calls of the CPU, and functions that load those of CUDA.
#include <nanobind/nanobind.h>

#include "../cpu/attention.h"
#include "cpu_handlers.h"
#include "cuda_module.h"

namespace nb = nanobind;

namespace {

// The handlers of platform "cpu" by custom-call name, as capsules for jax.ffi.register_ffi_target.
nb::dict registrations() {
  nb::dict handlers;
#define JF_PASS(id, name, ...) \
  handlers["jax_flash_" #name] = nb::capsule(reinterpret_cast<void*>(JaxFlash##id##Cpu));
#define JF_APPEND_PASS(id, name, ...) \
  handlers["jax_flash_" #name] = nb::capsule(reinterpret_cast<void*>(JaxFlash##id##Cpu));
#include "../results.def"
  return handlers;
}

}  // namespace

NB_MODULE(_core, module) {
  module.def("registrations", &registrations);
  module.def("cpu_isa", &jax_flash::cpu_isa);
  module.def("version", [] { return JAX_FLASH_VERSION; });
  jax_flash::bind_cuda(module);
  jax_flash::bind_plan(module);
}
