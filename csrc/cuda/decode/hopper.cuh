// Decode over latent pools on sm_90a: the absorbed form of multi-head latent attention (DeepSeek-V2), after
// FlashMLA. A KV head has 576 columns, of which the first 512 are V, and many query heads.
//
//   warpgroup 3     loads K page by page, and most of Q (latent_load.cuh)
//   warpgroup 2     S = Q Kᵀ [64, 48], P; it has some of Q's columns in registers
//   warpgroup 0, 1  O ← α O + P V, half of the columns each
//
// A tile of K is also V, so it is loaded once. The three stages overlap: S of a tile is computed while O of
// the tile before it is, and at most times two more tiles are being loaded.
#pragma once

#include "cuda/decode/hopper_cluster.cuh"
#include "cuda/decode/hopper_latent_few.cuh"
#include "cuda/decode/hopper_latent_scores.cuh"
#include "cuda/decode/hopper_latent_values.cuh"
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
  static constexpr int kWarps = 8, kReaderWarps = 12, kLoadWarps = 4;  // kWarps: those that compute O
  // How many parts, and blocks of 128 features, are merged together: as many as registers allow.
  static constexpr int kPartsAtOnce = 0, kBlocksAtOnce = 1;
  using QTile = SharedTile<T, kRows, kHeadDim - latent::kQueryColumnsInRegisters>;
  using KTile = SharedTile<T, kTile, kHeadDim>;
  using PTile = SharedTile<T, kRows, latent::kWeightColumns>;  // kTile columns of it are used
  static constexpr int kWeightBytes = latent::kWeightStages * PTile::kBytes;
  using Score = DecodeScore<Accumulator<1, kTile / 8>, kOptions>;
  using Column = LatentColumn<kRows, kOptions>;
  using Shared = LatentShared<LatentSm90>;
  static_assert(kRows == kConsumerRows && kThreads == 4 * kWarpgroup && kTile <= latent::kWeightColumns);
  static_assert(sizeof(Shared) <= latent::tile_bytes(R) + latent::kStateBytes);
};

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1) latent_sm90(const __grid_constant__ LatentCall call) {
  auto& shared = *reinterpret_cast<typename C::Shared*>(ptx::dynamic_shared_1024());
  constexpr int kValueRegisters = 160, kScoreRegisters = 120, kLoadRegisters = 72;
  static_assert(2 * kValueRegisters + kScoreRegisters + kLoadRegisters <= 4 * 128);
  run_latent<C>(call, shared, [&](int32_t kv_head, LatentLoader<C> loader) {
    const int warpgroup = warpgroup_index();
    if (warpgroup == 3) {
      ptx::give_registers<kLoadRegisters>();
      loader.run();
    } else if (warpgroup == 2) {
      ptx::take_registers<kScoreRegisters>();
      LatentScores<C>(call, shared, kv_head).run();
    } else {
      ptx::take_registers<kValueRegisters>();
      LatentValues<C>(call, shared, kv_head, warpgroup).run();
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
    return p.spec.softcap > 0 || p.alibi_slopes || p.draft_mask || p.ranges
               ? run.template operator()<true>()
               : run.template operator()<false>();
  } else {
    return decode::launch_in_clusters<decode::DecodeSm90<T, R>>(p, plan, workspace, stream);
  }
}

}  // namespace jax_flash
