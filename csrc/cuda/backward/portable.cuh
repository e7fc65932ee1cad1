// The portable backward, which runs on sm_75 and every newer card: FlashAttention-2 (Dao, 2023) with
// mma.sync, ldmatrix and cp.async.
#pragma once

#include "cuda/backward/keys.cuh"
#include "cuda/backward/keys_single_buffer.cuh"
#include "cuda/backward/queries.cuh"
#include "cuda/backward/query_sums.cuh"

namespace jax_flash::inline JF_ARCH_NAMESPACE {

// Launches the kernels of one row of csrc/kernels.def. A kernel over key tiles computes dK and dV. dQ comes
// from float32 sums or, if it has to be deterministic, from a kernel over query tiles; with all keys in one
// tile it comes from the first kernel.
template <class T, Row R, ScoreKind Kind>
cudaError_t launch_backward_sm80(const Problem& p, const LaunchPlan& plan, void* workspace,
                                 cudaStream_t stream) {
  using Plain = BackwardKeysSm80<T, R, ScoreKind::kPlain>;
  using Keys = BackwardKeysSm80<T, R, Kind>;
  // The host counts the shared memory of the plain kernel over key tiles (backward_shared_bytes).
  static_assert(Keys::kSharedBytes <= Plain::kSharedBytes);
  if constexpr (Keys::kOneTile) {
    return launch_backward_keys<Keys>(p, plan.keys, workspace, {}, stream);
  } else {
    using Queries = BackwardQueriesSm80<T, R, Kind>;
    static_assert(Queries::kSharedBytes <= Plain::kSharedBytes);
    const auto sums = query_sums<Keys::kM>(p, plan, workspace);
    if (cudaError_t e = clear_sums<Keys::kM>(p, plan, workspace, sums, stream); e != cudaSuccess) return e;
    if (cudaError_t e = launch_backward_keys<Keys>(p, plan.keys, workspace, sums, stream); e != cudaSuccess)
      return e;
    if (sums.data) return convert_sums<T, Keys::kM>(p, sums, plan.keys, workspace, stream);
    return launch_backward_queries<Queries>(p, plan.queries, workspace, stream);
  }
}

template <class T, Row R>
cudaError_t launch_row(const Problem& p, const LaunchPlan& plan, void* workspace, cudaStream_t stream) {
  return launch_score<R>(plan.score, [&]<ScoreKind kKind>() {
    return launch_backward_sm80<T, R, kKind>(p, plan, workspace, stream);
  });
}

}  // namespace jax_flash::inline JF_ARCH_NAMESPACE
