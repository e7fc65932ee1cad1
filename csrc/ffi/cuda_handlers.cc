// The FFI handlers of libjax_flash_cuda.so, and what else it exports (csrc/ffi/table.h). No Python here.
#include <cuda_runtime_api.h>

#include "core/plan.h"
#include "cuda/registry.h"
#include "ffi/operands.h"

#define JF_EXPORT extern "C" __attribute__((visibility("default")))

namespace jax_flash {
namespace {

ffi::Error cuda_error(const char* what, cudaError_t status) {
  return ffi::Error::Internal(std::string("jax_flash: ") + what + ": " + cudaGetErrorString(status));
}

cudaError_t current_device(Device& device) {
  int ordinal = 0, major = 0, minor = 0;
  if (cudaError_t e = cudaGetDevice(&ordinal); e != cudaSuccess) return e;
  const struct {
    int* value;
    cudaDeviceAttr attribute;
  } attributes[] = {{&major, cudaDevAttrComputeCapabilityMajor},
                    {&minor, cudaDevAttrComputeCapabilityMinor},
                    {&device.sm_count, cudaDevAttrMultiProcessorCount},
                    {&device.shared_memory, cudaDevAttrMaxSharedMemoryPerBlockOptin}};
  for (const auto& [value, attribute] : attributes) {
    if (cudaError_t e = cudaDeviceGetAttribute(value, attribute, ordinal); e != cudaSuccess) return e;
  }
  device.capability = major * 10 + minor;
  return cudaSuccess;
}

ffi::Error forward(cudaStream_t stream, ffi::RemainingArgs args, ffi::RemainingRets rets,
                   AttentionSpec spec) {
  Problem p;
  if (ffi::Error e = decode_operands(Pass::kForward, spec, args, rets, p); e.failure()) return e;
  auto workspace = rets.get<ffi::AnyBuffer>(2);  // after out and lse
  if (!workspace) return workspace.error();
  Device device;
  if (cudaError_t e = current_device(device); e != cudaSuccess) return cuda_error("device", e);
  const LaunchPlan chosen = plan(Pass::kForward, spec, shapes_of(p), device, built_kernels());
  if (chosen.kernel < 0) return ffi::Error::InvalidArgument(chosen.error);
  if (chosen.blocks == 0) return ffi::Error::Success();
  if (static_cast<int64_t>((*workspace)->size_bytes()) < chosen.workspace) {
    return ffi::Error::InvalidArgument("jax_flash: the call's workspace is smaller than its plan's");
  }
  void* memory = (*workspace)->untyped_data();
  const int32_t block_m = built_kernels()[chosen.kernel].block_m;
  if (cudaError_t e = launch_schedule(p, chosen, block_m, memory, stream); e != cudaSuccess) {
    return cuda_error("schedule", e);
  }
  const auto* schedule = static_cast<const TileWork*>(memory);
  if (cudaError_t e = launch_of(chosen.kernel)(p, chosen, schedule, stream); e != cudaSuccess) {
    return cuda_error(chosen.to_string(built_kernels()[chosen.kernel]).c_str(), e);
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jax_flash

JF_EXPORT XLA_FFI_Error* JaxFlashForwardCuda(XLA_FFI_CallFrame* frame);
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxFlashForwardCuda, jax_flash::forward,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<jax_flash::AttentionSpec>("spec"),
                              {xla::ffi::Traits::kCmdBufferCompatible});

JF_EXPORT const char* jax_flash_version() { return JAX_FLASH_VERSION; }

JF_EXPORT const jax_flash::KernelRow* jax_flash_kernels(int32_t* count) {
  const auto rows = jax_flash::built_kernels();
  *count = static_cast<int32_t>(rows.size());
  return rows.data();
}
