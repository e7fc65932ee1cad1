// How a thread block of the backward over key tiles shares its products among warps, and its shared memory.
#pragma once

#include <type_traits>

#include "core/families/portable_layout.h"
#include "cuda/ptx/barrier.cuh"
#include "cuda/score/portable_variants.cuh"
#include "cuda/tile/accumulator.cuh"
#include "cuda/tile/shared_tile.cuh"

namespace jax_flash::inline JF_ARCH_NAMESPACE {

// A row of csrc/kernels.def. A kernel for score options, which need more registers, takes half the query rows
// at a time if the warps can share those.
//
// Each product is cut into rows × columns of warps. For dK and dV a group of warps owns 32 (or 16) keys, and
// its warps share the columns. The same group computes S and dP of its keys, so that dK and dV wait for no
// other group's P and dS. Where S has fewer 16 × 16 blocks than there are warps, only the first warps of a
// group compute it.
template <class T, Row R, ScoreKind Kind>
struct BackwardKeysSm80 {
  using Element = T;
  static constexpr bool kSliced = R.is_sliced();  // dK, dV and dQ have the columns of a slice
  static constexpr int kSliceColumns = R.slice_columns();
  static constexpr int kHeadDim = R.head_dim, kValueDim = R.value_dim, kN = R.block_n;
  static constexpr int kDkColumns = kSliced ? kSliceColumns : kHeadDim,
                       kDvColumns = kSliced ? kSliceColumns : kValueDim;
  static constexpr int kStages = R.stages, kWarps = R.warps, kThreads = kWarps * 32;
  static constexpr bool kPlain = Kind == ScoreKind::kPlain;
  static constexpr int kDqColumns = R.block_m == 16 || (kWarps >= 8 && kHeadDim % 64 == 0) ? 4 : 2,
                       kDqRows = kWarps / kDqColumns;
  static constexpr int kM = !kPlain && R.block_m / 2 % (16 * kDqRows) == 0 ? R.block_m / 2 : R.block_m;
  static constexpr int kBlocks = R.blocks_for(Kind);
  static constexpr bool kOneTile = R.is_one_tile();  // the CTA has all keys, so that its dQ is complete
  static constexpr int kGroupKeys = kN < 32 ? kN : 32, kGroups = kN / kGroupKeys,
                       kGroupWarps = kWarps / kGroups;
  static constexpr int kSRows = kM / 16 < kGroupWarps ? kM / 16 : kGroupWarps;
  static constexpr int kSColumns = kWarps / kSRows < kN / 16 ? kWarps / kSRows : kN / 16;
  // Permuted tiles give each thread adjacent keys, so that bias and mask are read in wide loads.
  static constexpr bool kPermuted = is_general(Kind) && kN / kSColumns % 32 == 0;
  using KTile = SharedTile<T, kN, kHeadDim, kPermuted>;
  using VTile = SharedTile<T, kN, kValueDim, kPermuted>;
  using QTile = SharedTile<T, kM, kHeadDim>;
  using DoTile = SharedTile<T, kM, kValueDim>;
  using KSlice = SharedTile<T, kN, kDkColumns, kPermuted>;
  using VSlice = SharedTile<T, kN, kDvColumns, kPermuted>;
  using QSlice = SharedTile<T, kM, kDkColumns>;
  using DoSlice = SharedTile<T, kM, kDvColumns>;
  using PTile = SharedTile<T, kM, kN>;
  static constexpr int kSRowTiles = kM / kSRows / 16, kSColumnTiles = kN / kSColumns / 8;
  using S = std::conditional_t<kPermuted, PermutedAccumulator<kSRowTiles, kPermuted ? kSColumnTiles : 4>,
                               Accumulator<kSRowTiles, kSColumnTiles>>;
  using Score = PortableScore<Kind, S>;
  using DK = Accumulator<kGroupKeys / 16, kDkColumns / kGroupWarps / 8>;
  using DV = Accumulator<kGroupKeys / 16, kDvColumns / kGroupWarps / 8>;
  using DQ = Accumulator<kM / kDqRows / 16, kDkColumns / kDqColumns / 8>;
  static constexpr bool kSingleBuffer = kStages == 0;  // Q and dO share one buffer
  static constexpr BackwardLayout kLayout = backward_layout(R.with_tile(kM, kN), sizeof(T));
  static constexpr int kSharedBytes = kLayout.bytes;
  static_assert(kLayout.v == KTile::kBytes && kLayout.queries == KTile::kBytes + VTile::kBytes &&
                kLayout.ds - kLayout.p == PTile::kBytes && kLayout.barriers - kLayout.ds == PTile::kBytes &&
                kLayout.lse == ring_bytes(kSingleBuffer ? 0 : 1, QTile::kBytes, DoTile::kBytes));
  static_assert(kN % kGroupKeys == 0 && kM % (16 * kSRows) == 0 && kN % (16 * kSColumns) == 0 &&
                kM % (16 * kDqRows) == 0 && kSColumns % kGroups == 0);
  static_assert(kDkColumns % (16 * kGroupWarps) == 0 && kDvColumns % (16 * kGroupWarps) == 0);
  static_assert(kDkColumns % (16 * kDqColumns) == 0 && (!kSliced || kHeadDim == kValueDim) && kStages <= 2 &&
                kThreads >= kM);
};

// Which part of each product this warp computes.
template <class C>
struct WarpPartition {
  int group;
  bool computes_s;
  Placement s, dk, dq;

  __device__ __forceinline__ WarpPartition() {
    constexpr int kPerGroup = C::kSColumns / C::kGroups;
    const auto warp = __shfl_sync(~0u, static_cast<uint32_t>(ptx::thread_index()) / 32, 0);
    group = static_cast<int>(warp / C::kGroupWarps);
    const int part = static_cast<int>(warp % C::kGroupWarps);
    computes_s = C::kSRows * C::kSColumns == C::kWarps || part < C::kSRows * kPerGroup;
    s = {part / kPerGroup * 16 * C::S::kRowTiles, 16,
         (group * kPerGroup + part % kPerGroup) * 8 * C::S::kColumnTiles, 16};
    dk = {group * C::kGroupKeys, 16, part * 16, 16 * C::kGroupWarps};
    dq = {static_cast<int>(warp / C::kDqColumns) * 16 * C::DQ::kRowTiles, 16,
          static_cast<int>(warp % C::kDqColumns) * 16, 16 * C::kDqColumns};
  }
};

}  // namespace jax_flash::inline JF_ARCH_NAMESPACE
