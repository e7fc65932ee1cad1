// Bias and mask of a tile of scores [M, N] in shared memory, for the sm_90a kernels that compute gradients. A
// producer warp copies them by cp.async, 8 keys at a time. Elements outside the sequence may hold NaN and are
// replaced by zeros. A kernel may load a bias by TMA instead, and hide such elements itself.
#pragma once

#include <cstdint>

#include "cuda/hopper/pipeline.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/ldmatrix.cuh"
#include "cuda/score/mask.cuh"
#include "cuda/score/operands.cuh"
#include "cuda/tile/operands.cuh"
#include "cuda/tile/shared_tile.cuh"

namespace jax_flash {

// For variants that stage nothing.
struct NoScoreTiles {
  static constexpr bool kStaged = false;
  struct Buffer {};
  struct Pipe {
    __device__ __forceinline__ void init(uint32_t) {}
  };
};

// Shared: the kernel's shared memory, with a Buffer score_tiles and a Pipe score_pipe.
template <class T, int M, int N, int Stages, bool HasBias, bool HasMask>
struct ScoreTiles {
  static constexpr bool kStaged = true;
  static constexpr int kStages = Stages;
  static constexpr int kPiece = 8, kPieces = N / kPiece;  // keys of a copy, copies of a row
  using BiasTile = SharedTile<T, M, N>;
  using MaskTile = SharedTile<uint8_t, M, N>;
  static constexpr int kBiasBytes = HasBias ? BiasTile::kBytes : 0,
                       kMaskBytes = HasMask ? MaskTile::kBytes : 0;
  static_assert(kPieces <= 32 && 32 % kPieces == 0);

  struct Buffer {
    alignas(1024) uint8_t stages[Stages][kBiasBytes + kMaskBytes];
  };
  struct Pipe : Pipeline<Stages> {
    __device__ __forceinline__ void init(uint32_t releases) { Pipeline<Stages>::init(releases, 32); }
  };

  // One warp copies the tile that begins at query `row` and key `key` of the sequence to an empty stage.
  template <class Shared>
  __device__ __forceinline__ static void load(Shared& shared, const Problem& p, const ScoreOperands& operands,
                                              const Band& band, int32_t row, int32_t key, uint32_t use) {
    const uint32_t bias = stage_of(shared, use), mask = bias + kBiasBytes;
    const int32_t rows = band.q_len - row, keys = band.k_len - key;
    const auto copy_tile = [&]<class Tile>(uint32_t to, const void* from, int64_t row_stride) {
      using Element = typename Tile::Element;
      copy<Tile>(to, static_cast<const Element*>(from) + row * row_stride + key, row_stride, rows, keys);
    };
    if (HasBias && p.bias) copy_tile.template operator()<BiasTile>(bias, operands.bias, p.bias.row);
    if (HasMask && p.mask) copy_tile.template operator()<MaskTile>(mask, operands.mask, p.mask.row);
    ptx::barrier_arrive_after_copies(shared.score_pipe.full_barrier(use));
  }

  // add(x, bias) for every element x of S, and x ← −inf where the mask hides the key. S begins at query `row`
  // and key `column` of the tile, which the caller has waited for.
  template <class S, class Shared, class Add>
  __device__ __forceinline__ static void apply(S& s, const Shared& shared, const Problem& p, int row,
                                               int column, uint32_t use, Add add) {
    const uint32_t bias = stage_of(shared, use), mask = bias + kBiasBytes;
    if (HasBias && (!HasMask || p.bias)) {  // a kernel without a mask is only for calls with a bias
      if constexpr (S::kTransposed) {
        add_transposed(s, bias, row, column, add);
      } else {
        for_each_bias<S>(bias, row, column,
                         [&](int slot, int n, int e, float x) { add(s.at(slot, n, e), x); });
      }
    }
    if (HasMask && p.mask) hide(s, mask, row, column);
  }

  template <class Shared>
  __device__ __forceinline__ static uint32_t stage_of(const Shared& shared, uint32_t use) {
    return ptx::shared_address(shared.score_tiles.stages[use % Stages]);
  }

  // visit(slot, n, e, bias) for every element of scores S [64, N] in rows, which begin at query `row` and key
  // `column` of the tile.
  template <class S, class Visit>
  __device__ __forceinline__ static void for_each_bias(uint32_t tile, int row, int column, Visit visit) {
    static_assert(S::kSlots == 2 && !S::kTransposed);
    const LaneAddress<BiasTile> from(tile, row + lane_id() % 16, column / 8 + lane_id() / 16);
#pragma unroll
    for (int n = 0; n < S::kColumnTiles; n += 2) {
      uint32_t pairs[4];
      ptx::ldmatrix_x4(pairs, from.at(0, n));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 bias = ptx::unpack<T>(pairs[i]);
        visit(i % 2, n + i / 2, 0, bias.x);
        visit(i % 2, n + i / 2, 1, bias.y);
      }
    }
  }

 private:
  // rows, keys: the numbers of rows and keys, from the tile's first on, that are in use.
  template <class Tile>
  __device__ __forceinline__ static void copy(uint32_t to, const typename Tile::Element* from,
                                              int64_t row_stride, int32_t rows, int32_t keys) {
    constexpr int kBytes = kPiece * static_cast<int>(sizeof(typename Tile::Element)), kRows = 32 / kPieces;
    const int lane = static_cast<int>(threadIdx.x % 32), first = lane / kPieces, piece = lane % kPieces;
    const int32_t used = max(0, min(kPiece, keys - piece * kPiece)) * (kBytes / kPiece);
    const auto* at = from + first * row_stride + piece * kPiece;
#pragma unroll 4
    for (int row = first; row < M; row += kRows, at += kRows * row_stride) {
      const uint32_t chunk = to + Tile::offset(row, piece * kBytes / 16) + piece * kBytes % 16;
      ptx::cp_async_part<kBytes>(chunk, at, row < rows ? used : 0);
    }
  }

  template <class S, class Add>
  __device__ __forceinline__ static void add_transposed(S& s, uint32_t tile, int row, int column, Add add) {
    static_assert(S::kColumnTiles == 1 && S::kSlots % 4 == 0);
    const int lane = lane_id();
    const LaneAddress<BiasTile> from(tile, row + lane / 16 * 8 + lane % 8, column / 8 + lane / 8 % 2);
#pragma unroll
    for (int slot = 0; slot < S::kSlots; slot += 4) {  // two query tiles, each of two blocks of 8 keys
      uint32_t pairs[4];
      ptx::ldmatrix_x4_trans(pairs, from.at(S::row_step(slot), 0));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 bias = ptx::unpack<T>(pairs[i]);
        add(s.at(slot + i / 2 * 2, 0, i % 2), bias.x);
        add(s.at(slot + i / 2 * 2 + 1, 0, i % 2), bias.y);
      }
    }
  }

  template <class S>
  __device__ __forceinline__ static void hide(S& s, uint32_t tile, int row, int column) {
    // Rows that are 8 apart have the same swizzle. A lane's first two rows differ, if it has two.
    constexpr int kOwn = S::kTransposed ? 2 : 1;
    LaneAddress<MaskTile> from[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) from[i] = {tile, row + S::row(i), column / 16};
    const int first = S::column(0);  // below 8
#pragma unroll
    for (int slot = 0; slot < S::kSlots; ++slot) {
      const int own = S::kTransposed ? slot % 2 : 0;
#pragma unroll
      for (int n = 0; n < S::kColumnTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int key = S::column_step(n, e);
          const uint32_t seen = ptx::load_shared_byte(
              from[own].at(S::row_step(slot) - S::row_step(own), key / 16) + key % 16 + first);
          hide_unless(s.at(slot, n, e), seen);
        }
      }
    }
  }
};

}  // namespace jax_flash
