// The properties of a GPU that plan() needs.
#pragma once

#include <cuda_runtime_api.h>

#include "core/plan/call.h"

namespace jax_flash {

inline cudaError_t ask_device(int ordinal, Device& device) {
  int major = 0, minor = 0;
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

}  // namespace jax_flash
