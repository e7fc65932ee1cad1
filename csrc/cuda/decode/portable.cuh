// The portable decode, for few query rows against many keys: Flash-Decoding (Dao et al., 2023). It is bound
// by memory bandwidth, so each key and value is read once and the copies never stop. A CTA works on one KV
// head, whose query heads share its products.
#pragma once

#include "cuda/decode/latent_portable.cuh"
#include "cuda/decode/shares.cuh"
#include "cuda/launch.h"
#include "cuda/ptx/dependent.cuh"
#include "cuda/registry.h"

namespace jax_flash {
namespace decode::inline JF_ARCH_NAMESPACE {

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocks)
    decode_sm80(const __grid_constant__ DecodeCall call) {
  ptx::let_next_kernel_start();  // the forward, for packed sequences with more rows
  attend_share<C>(call);
  ptx::wait_for_kernel_before();  // the forward waits for this kernel alone, and reads the schedule
}

template <class C>
cudaError_t launch(const Problem& p, const LaunchPlan& plan, void* workspace, cudaStream_t stream) {
  DecodeGrid grid = plan.decode;
  grid.part_tiles /= C::kRowTiles;
  const int64_t blocks = int64_t{grid.columns} * grid.ranges;
  for (int64_t outer = 0; outer < outer_entries(p.leading); ++outer) {
    const DecodeCall call = make_call<C::kTile>(p, grid, C::kRows, outer, workspace);
    cudaError_t e = launch_decode_lists(call, C::kRows, C::kTile, stream);
    if (e != cudaSuccess) return e;
    // Launches share the partial results in the workspace, so only the first one may start early, or those
    // after the kernel that makes lists, which starts when the launch before has ended.
    const bool early =
        (call.lists || (p.packed() && outer == 0)) && can_wait(reinterpret_cast<const void*>(decode_sm80<C>));
    e = launch_early(early, decode_sm80<C>, 1, blocks, C::kThreads, C::kSharedBytes, stream, call);
    if (e != cudaSuccess) return e;
  }
  return cudaSuccess;
}

}  // namespace decode::inline JF_ARCH_NAMESPACE

inline namespace JF_ARCH_NAMESPACE {

template <class T, Row R>
cudaError_t launch_decode(const Problem& p, const LaunchPlan& plan, void* workspace, cudaStream_t stream) {
  // At head dims above 256 ptxas spills a third of O in the kernel without options, but nothing in the one
  // with them, which then is the only kernel.
  constexpr bool kAlways = R.value_dim > 256;
  const auto run = [&]<class Stored>() {
    constexpr bool kFloat8 = sizeof(Stored) < sizeof(T);
    const auto launch = [&]<bool kOptions, bool kPageScales>() {
      using C = decode::DecodeShares<T, Stored, R, kOptions, kPageScales>;
      return decode::launch<C>(p, plan, workspace, stream);
    };
    if (kAlways || decode::has_options(p)) return launch.template operator()<true, kFloat8>();
    if (decode::scaled_by_page(p)) return launch.template operator()<kAlways, kFloat8>();
    return launch.template operator()<kAlways, kAlways && kFloat8>();
  };
  if (!is_float8(p.kv_dtype)) return run.template operator()<T>();
  if constexpr (R.takes(DType::kF8E4M3)) {
    return run.template operator()<uint8_t>();
  } else {
    return cudaErrorInvalidValue;  // plan() never chooses this row for float8
  }
}

template <class T, Row R>
cudaError_t launch_row(const Problem& p, const LaunchPlan& plan, void* workspace, cudaStream_t stream) {
  if constexpr (R.is_latent()) {
    using C = decode::LatentSm80<T, R>;
    return decode::launch_latent<C>(decode::latent_sm80<C>, p, plan, workspace, stream);
  } else {
    return launch_decode<T, R>(p, plan, workspace, stream);
  }
}

}  // namespace JF_ARCH_NAMESPACE
}  // namespace jax_flash
