// The forward over pages: cuda/forward/sm80.cuh with PagedState.
#pragma once

#include "cuda/forward/sm80.cuh"

#undef JF_DEFINE_LAUNCH
#define JF_DEFINE_LAUNCH(name, dtype, ...)                                                           \
  namespace jax_flash {                                                                              \
  cudaError_t name(const Problem& p, const LaunchPlan& plan, void* workspace, cudaStream_t stream) { \
    return launch_paged_forward_sm80<dtype, __VA_ARGS__>(p, plan, workspace, stream);                \
  }                                                                                                  \
  }
