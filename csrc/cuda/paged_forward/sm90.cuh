// The forward over pages for sm_90a: cuda/forward/sm90.cuh with another loader.
#pragma once

#include "cuda/forward/sm90.cuh"
#include "cuda/load/hopper_pages.cuh"

#undef JF_LAUNCH_FORWARD
#undef JF_DEFINE_LAUNCH
#define JF_LAUNCH_FORWARD(kind, dtype, ...) \
  launch_forward_sm90<ForwardSm90<dtype, __VA_ARGS__, ScoreKind::kind, PagedLoader>>(p, plan, workspace, stream)
#define JF_DEFINE_LAUNCH(name, dtype, ...)                                                           \
  namespace jax_flash {                                                                              \
  cudaError_t name(const Problem& p, const LaunchPlan& plan, void* workspace, cudaStream_t stream) { \
    using Plain = ForwardSm90<dtype, __VA_ARGS__, ScoreKind::kPlain>;                                \
    switch (plan.score) {                                                                            \
      JF_CASE(kPlain, dtype, __VA_ARGS__)                                                            \
      JF_CASE(kGeneral, dtype, __VA_ARGS__)                                                          \
      default:                                                                                       \
        break;                                                                                       \
    }                                                                                                \
    return cudaErrorNotSupported;                                                                    \
  }                                                                                                  \
  }
