// Bias and mask of a tile of scores [M, N] in shared memory, for the sm_90a kernels that compute gradients. A
// producer warp copies them by cp.async, 8 keys at a time, of a float32 bias 4. Elements outside the sequence
// may hold NaN and are replaced by zeros. A kernel may load a bias by TMA instead, and hide such elements
// itself.
#pragma once

#include <cstdint>

#include "cuda/hopper/pipeline.cuh"
#include "cuda/load/bias_tile.cuh"
#include "cuda/ptx/cp_async.cuh"
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

// Shared: the kernel's shared memory, with a Buffer score_tiles and a Pipe score_pipe. Bias: its element
// type. kOneRow: tiles of a bias that queries share have one row; else the row is copied to all.
template <class Bias, int M, int N, int Stages, bool HasBias, bool HasMask, bool kOneRow>
struct ScoreTiles {
  static constexpr bool kStaged = true;
  static constexpr int kStages = Stages;
  static constexpr int kPiece = kChunk<Bias>, kPieces = N / kPiece;  // keys of a copy, copies of a row
  using BiasTile = SharedTile<Bias, M, N>;
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
    const auto copy_tile = [&]<class Tile>(uint32_t to, const void* from, int64_t row_stride, int count = M) {
      using Element = typename Tile::Element;
      copy<Tile>(to, static_cast<const Element*>(from) + row * row_stride + key, row_stride, count, rows,
                 keys);
    };
    if (HasBias && p.bias)
      copy_tile.template operator()<BiasTile>(bias, operands.bias, p.bias.row, one_row(p) ? 1 : M);
    if constexpr (HasMask) {
      if (p.mask) copy_tile.template operator()<MaskTile>(mask, operands.mask, p.mask.row);
    }
    ptx::barrier_arrive_after_copies(shared.score_pipe.full_barrier(use));
  }

  // add(x, bias) for every element x of S, and x ← −inf where the mask hides the key. S begins at query `row`
  // and key `column` of the tile, which the caller has waited for.
  template <class S, class Shared, class Add>
  __device__ __forceinline__ static void apply(S& s, const Shared& shared, const Problem& p, int row,
                                               int column, uint32_t use, Add add) {
    const uint32_t bias = stage_of(shared, use), mask = bias + kBiasBytes;
    if (HasBias && (!HasMask || p.bias)) {  // a kernel without a mask is only for calls with a bias
      const auto visit = [&](int slot, int n, int e, float x) { add(s.at(slot, n, e), x); };
      if constexpr (S::kTransposed) {
        for_each_bias_transposed<BiasTile, S>(bias, row, column, one_row(p), visit);
      } else {
        for_each_bias<BiasTile, S>(bias, row, column, one_row(p), visit);
      }
    }
    if (HasMask && p.mask) hide(s, mask, row, column);
  }

  template <class Shared>
  __device__ __forceinline__ static uint32_t stage_of(const Shared& shared, uint32_t use) {
    return ptx::shared_address(shared.score_tiles.stages[use % Stages]);
  }

 private:
  __device__ __forceinline__ static bool one_row(const Problem& p) { return kOneRow && has_one_row(p); }

  // count: of the tile's rows that are copied; rows, keys: of those in use, from the tile's first on.
  template <class Tile>
  __device__ __forceinline__ static void copy(uint32_t to, const typename Tile::Element* from,
                                              int64_t row_stride, int count, int32_t rows, int32_t keys) {
    constexpr int kBytes = kPiece * static_cast<int>(sizeof(typename Tile::Element)), kRows = 32 / kPieces;
    const int lane = static_cast<int>(threadIdx.x % 32), first = lane / kPieces, piece = lane % kPieces;
    const int32_t used = max(0, min(kPiece, keys - piece * kPiece)) * (kBytes / kPiece);
    const auto* at = from + first * row_stride + piece * kPiece;
#pragma unroll 4
    for (int row = first; row < count; row += kRows, at += kRows * row_stride) {
      const uint32_t chunk = to + Tile::offset(row, piece * kBytes / 16) + piece * kBytes % 16;
      ptx::cp_async_part<kBytes>(chunk, at, row < rows ? used : 0);
    }
  }

  template <class S>
  __device__ __forceinline__ static void hide(S& s, uint32_t tile, int row, int column) {
    for_each_address<MaskTile, S>(tile, row, column, [&](int slot, int n, int e, uint32_t at) {
      hide_unless(s.at(slot, n, e), ptx::load_shared_byte(at));
    });
  }
};

}  // namespace jax_flash
