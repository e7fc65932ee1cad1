// Launching a kernel on XLA's stream.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace jax_flash {

// The next kernel on the stream wants as much shared memory as the last: changing the split with L1 takes
// time.
template <class... Parameters>
cudaError_t prefer_shared_memory(void (*kernel)(Parameters...)) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                              cudaSharedmemCarveoutMaxShared);
}

// Nothing happens without blocks. `cluster` of them at a time run side by side and reach each other.
template <class... Parameters>
cudaError_t launch_clusters(void (*kernel)(Parameters...), uint32_t cluster, int64_t blocks, int32_t threads,
                            size_t shared, cudaStream_t stream,
                            std::type_identity_t<Parameters>... arguments) {
  if (blocks == 0) return cudaSuccess;
  constexpr size_t kSharedWithoutAsking = 44 << 10;  // of 48 KB, which hold static shared memory too
  if (shared > kSharedWithoutAsking) {
    const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
    const cudaError_t e = cudaFuncSetAttribute(kernel, attribute, static_cast<int>(shared));
    if (e != cudaSuccess) return e;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<uint32_t>(blocks));
  config.blockDim = dim3(static_cast<uint32_t>(threads));
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster, attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = cluster > 1;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <class... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int32_t threads, size_t shared,
                   cudaStream_t stream, std::type_identity_t<Parameters>... arguments) {
  return launch_clusters(kernel, 1, blocks, threads, shared, stream, arguments...);
}

}  // namespace jax_flash
