// The gradient of a bias that all batch entries share, if few tiles of it would leave SMs idle: CTAs sum
// parts of the batch (LaunchPlan::parts), and another kernel adds these sums.
#pragma once

#include "core/plan/launch_plan.h"
#include "core/problem.h"
#include "core/schema.h"
#include "cuda/launch.h"
#include "cuda/ptx/math.cuh"

namespace jax_flash::inline JF_ARCH_NAMESPACE {

// The call that the kernel runs: parts become a leading dimension, and dbias is float32, in the workspace.
inline Problem with_batch_parts(const Problem& p, const LaunchPlan& plan, void* workspace) {
  if (plan.parts == 1) return p;
  Problem parts = p;
  parts.leading = {1, {plan.parts}};
  parts.batch = p.batch / plan.parts;
  const auto divide = [&](const schema::Array& array) {
    if (!array.view) return;
    View& view = parts.*array.view;
    view.leading[0] = view.batch * parts.batch;
  };
  for (const schema::Array& array : schema::kOwn) divide(array);
  for (const schema::Array& array : schema::kLike) divide(array);
  parts.dbias.data = static_cast<char*>(workspace) + plan.part_sums;
  parts.dbias.leading[0] = int64_t{p.dbias_heads} * p.dbias_rows * p.dbias_columns;
  return parts;
}

inline constexpr int kSumOfPartsThreads = 256;

// dbias = the sum of its parts.
template <class B>
__global__ void __launch_bounds__(kSumOfPartsThreads)
    sum_batch_parts(B* to, const float* from, uint32_t elements, int32_t parts) {
  const uint32_t i = blockIdx.x * kSumOfPartsThreads + threadIdx.x;
  if (i >= elements) return;
  float sum = 0;
  for (int32_t part = 0; part < parts; ++part) sum += from[int64_t{part} * elements + i];
  to[i] = B(sum);
}

inline cudaError_t add_batch_parts(const Problem& p, const LaunchPlan& plan, const void* workspace,
                                   cudaStream_t stream) {
  if (plan.parts == 1) return cudaSuccess;
  const auto* from = reinterpret_cast<const float*>(static_cast<const char*>(workspace) + plan.part_sums);
  const auto elements = static_cast<uint32_t>(p.dbias_heads * p.dbias_rows * p.dbias_columns);
  const auto add = [&]<class B>(B* to) {
    return launch(sum_batch_parts<B>, ceil_div(elements, kSumOfPartsThreads), kSumOfPartsThreads, 0, stream,
                  to, from, elements, plan.parts);
  };
  if (p.bias_dtype == DType::kF32) return add(p.dbias.as<float32>());
  if (p.bias_dtype == DType::kF16) return add(p.dbias.as<float16>());
  return add(p.dbias.as<bfloat16>());
}

}  // namespace jax_flash::inline JF_ARCH_NAMESPACE
