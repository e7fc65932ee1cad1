// The Python module jax_flash._core: the custom calls of the CPU, and the way to those of CUDA.
#include <nanobind/nanobind.h>

#include "../cpu/attention.h"
#include "cpu_handlers.h"
#include "cuda_module.h"

namespace nb = nanobind;

namespace {

// The handlers of platform "cpu" by custom-call name, as capsules for jax.ffi.register_ffi_target.
nb::dict registrations() {
  nb::dict handlers;
  handlers["jax_flash_forward"] = nb::capsule(reinterpret_cast<void*>(JaxFlashForwardCpu));
  handlers["jax_flash_backward"] = nb::capsule(reinterpret_cast<void*>(JaxFlashBackwardCpu));
  handlers["jax_flash_bias_gradient"] = nb::capsule(reinterpret_cast<void*>(JaxFlashBiasGradientCpu));
  handlers["jax_flash_tangent"] = nb::capsule(reinterpret_cast<void*>(JaxFlashTangentCpu));
  handlers["jax_flash_append"] = nb::capsule(reinterpret_cast<void*>(JaxFlashAppendCpu));
  handlers["jax_flash_append_dynamic"] = nb::capsule(reinterpret_cast<void*>(JaxFlashAppendDynamicCpu));
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
