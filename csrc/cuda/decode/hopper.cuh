// Decode over latent pools on sm_90a: the absorbed form of multi-head latent attention (DeepSeek-V2), after
// FlashMLA. A KV head has 576 columns, of which the first 512 are V, and many query heads.
//
//   warpgroup 2   loads Q, and K page by page (latent_load.cuh)
//   warpgroup 0   S = Q Kᵀ [64, 64], P, O ← O + P V, the left half of the columns
//   warpgroup 1                      O ← O + P V, the right half
//
// A tile of K is also V, so it is loaded once. Products and loads of the next tile overlap; the softmax of
// warpgroup 0 overlaps with the products of warpgroup 1 only.
#pragma once

#include "cuda/decode/hopper_cluster.cuh"
#include "cuda/decode/hopper_latent_consumer.cuh"
#include "cuda/decode/hopper_latent_few.cuh"
#include "cuda/decode/latent_load.cuh"
#include "cuda/registry.h"

namespace jax_flash {
namespace decode {

// A row of csrc/kernels.def: M query rows of a KV head, and N keys per tile. kOptions: whether there are
// score options.
template <class T, Row R, bool kOptions>
struct LatentSm90 {
  using Element = T;
  static constexpr int kHeadDim = R.head_dim, kValueDim = R.value_dim, kRows = R.block_m, kTile = R.block_n;
  static constexpr int kStages = R.stages, kThreads = R.warps * 32;
  static constexpr int kWarps = 8, kLoadWarps = 4;
  using QTile = SharedTile<T, kRows, kHeadDim>;
  using KTile = SharedTile<T, kTile, kHeadDim>;
  using PTile = SharedTile<T, kRows, kTile>;
  using Score = DecodeScore<Accumulator<1, kTile / 8>, kOptions>;
  using Column = LatentColumn<kRows, kOptions>;
  using Shared = LatentShared<LatentSm90>;
  static_assert(kRows == kConsumerRows && kThreads == 3 * kWarpgroup);
  static_assert(sizeof(Shared) <= latent::tile_bytes(R) + latent::kStateBytes);
};

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1) latent_sm90(const __grid_constant__ LatentCall call) {
  auto& shared = *reinterpret_cast<typename C::Shared*>(ptx::dynamic_shared_1024());
  constexpr int kConsumers = C::Shared::kConsumers;
  // The second consumer has no S. It keeps the registers that the kernel is launched with.
  constexpr int kFirstRegisters = 232, kLaunchRegisters = 168, kProducerRegisters = 104;
  static_assert(kFirstRegisters + kLaunchRegisters + kProducerRegisters <= 3 * kLaunchRegisters);
  run_latent<C>(call, shared, [&](int32_t kv_head, LatentLoader<C> loader) {
    const int warpgroup = warpgroup_index();
    if (warpgroup == kConsumers) {
      ptx::give_registers<kProducerRegisters>();
      loader.run();
    } else if (warpgroup == 0) {
      ptx::take_registers<kFirstRegisters>();
      LatentConsumer<C, 0>(call, shared, kv_head).run();
    } else {
      LatentConsumer<C, 1>(call, shared, kv_head).run();
    }
  });
}

}  // namespace decode

template <class T, Row R>
cudaError_t launch_row(const Problem& p, const LaunchPlan& plan, void* workspace, cudaStream_t stream) {
  if constexpr (R.is_latent()) {
    const auto run = [&]<bool kOptions>() {
      if constexpr (R.design == Design::kLatentFew) {
        using C = decode::LatentFewSm90<T, R, kOptions>;
        return decode::launch_latent<C>(decode::latent_few_sm90<C>, p, plan, workspace, stream);
      } else {
        using C = decode::LatentSm90<T, R, kOptions>;
        return decode::launch_latent<C>(decode::latent_sm90<C>, p, plan, workspace, stream);
      }
    };
    return decode::has_options(p) ? run.template operator()<true>() : run.template operator()<false>();
  } else {
    return decode::launch_in_clusters<decode::DecodeSm90<T, R>>(p, plan, workspace, stream);
  }
}

}  // namespace jax_flash
