// Kernel launches on XLA's stream.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <type_traits>
#include <utility>

namespace jax_flash {

// The grid: a number of thread blocks, times the slices of columns per tile.
struct Blocks {
  int64_t count;
  int32_t slices = 1;

  Blocks(int64_t count, int32_t slices = 1) : count(count), slices(slices) {}
};

// A value for each kernel on each device, which all threads of the process share. It is 0 until it is known.
class ValueOfKernel {
 public:
  // Calls use(value) with the value for the current device.
  template <class Use>
  cudaError_t with(const void* kernel, Use use) {
    int device = 0;
    if (cudaError_t e = cudaGetDevice(&device); e != cudaSuccess) return e;
    const std::lock_guard lock(mutex_);
    return use(values_[{device, kernel}]);
  }

 private:
  std::mutex mutex_;
  std::map<std::pair<int, const void*>, int> values_;
};

// Allows a kernel more dynamic shared memory than the 48 KB that it may use without. The limit is remembered,
// since asking CUDA takes .3 µs, and only raised, because the kernels of append take different sizes and all
// threads of the process share it.
inline cudaError_t allow_shared(const void* kernel, int bytes) {
  static ValueOfKernel allowed;
  return allowed.with(kernel, [&](int& most) {
    if (bytes <= most) return cudaSuccess;
    const cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (e == cudaSuccess) most = bytes;
    return e;
  });
}

// Whether a kernel's code was compiled for sm_90 or newer, so that it can wait for the kernel before it
// (ptx/dependent.cuh). Code for older devices runs on newer ones, too.
inline bool can_wait(const void* kernel) {
  static ValueOfKernel versions;
  int version = 0;
  const cudaError_t e = versions.with(kernel, [&](int& known) {
    cudaFuncAttributes attributes;
    if (known == 0) {
      if (cudaError_t e = cudaFuncGetAttributes(&attributes, kernel); e != cudaSuccess) return e;
      known = attributes.ptxVersion;
    }
    version = known;
    return cudaSuccess;
  });
  return e == cudaSuccess && version >= 90;
}

// Launches `blocks` thread blocks in clusters of size `cluster`, or nothing if there are none. `shared`:
// bytes of dynamic shared memory. early: the kernel may start before the one before it has ended, and waits
// for it itself (ptx/dependent.cuh).
template <class... Parameters>
cudaError_t launch_early(bool early, void (*kernel)(Parameters...), uint32_t cluster, Blocks blocks,
                         int32_t threads, size_t shared, cudaStream_t stream,
                         std::type_identity_t<Parameters>... arguments) {
  if (blocks.count == 0 || blocks.slices == 0) return cudaSuccess;
  constexpr size_t kDefaultShared = 40 << 10;  // 8 KB are left for what a kernel declares statically
  if (shared > kDefaultShared) {
    const cudaError_t e = allow_shared(reinterpret_cast<const void*>(kernel), static_cast<int>(shared));
    if (e != cudaSuccess) return e;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<uint32_t>(blocks.count), static_cast<uint32_t>(blocks.slices));
  config.blockDim = dim3(static_cast<uint32_t>(threads));
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  cudaLaunchAttribute attributes[2]{};
  config.attrs = attributes;
  if (cluster > 1) {
    cudaLaunchAttribute& x = attributes[config.numAttrs++];
    x.id = cudaLaunchAttributeClusterDimension;
    x.val.clusterDim.x = cluster, x.val.clusterDim.y = x.val.clusterDim.z = 1;
  }
  if (early) {
    cudaLaunchAttribute& x = attributes[config.numAttrs++];
    x.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    x.val.programmaticStreamSerializationAllowed = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// Launches in clusters, after the kernel before has ended.
template <class... Parameters>
cudaError_t launch_clusters(void (*kernel)(Parameters...), uint32_t cluster, Blocks blocks, int32_t threads,
                            size_t shared, cudaStream_t stream,
                            std::type_identity_t<Parameters>... arguments) {
  return launch_early(false, kernel, cluster, blocks, threads, shared, stream, arguments...);
}

// The same without clusters.
template <class... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), Blocks blocks, int32_t threads, size_t shared,
                   cudaStream_t stream, std::type_identity_t<Parameters>... arguments) {
  return launch_clusters(kernel, 1, blocks, threads, shared, stream, arguments...);
}

}  // namespace jax_flash
