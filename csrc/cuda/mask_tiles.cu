// Classifies the tiles of a boolean mask (core/visible/mask_tiles.h). The kernel is memory-bound: it reads
// the mask once, 8 keys per load where strides allow that.
#include "core/visible/mask_tiles.h"

#include "cuda/launch.h"
#include "cuda/ptx/dependent.cuh"
#include "cuda/registry.h"
#include "cuda/score/mask_bits.cuh"

namespace jax_flash {
namespace {

constexpr int kTiles = 8;                              // tiles of a CTA, neighbours in a row of tiles
constexpr int kWarps = 8, kRows = kRowBlock / kWarps;  // kRows: rows of a warp
constexpr int kKeys = kTiles * kRowBlock;
constexpr int kChunk = 8, kChunkLanes = kRowBlock / kChunk;  // keys per load; loads per row of a tile

// Bit t is for tile t. any: some row sees some key; all: every row sees every key.
struct TileBits {
  uint32_t any, all;
};

// The bits of a warp's elements [rows, keys] at `from`, read 8 keys per load. Elements past the mask's end do
// not count.
__device__ TileBits bits_of_chunks(const uint8_t* from, int64_t row, int32_t rows, int32_t keys) {
  constexpr int kSteps = kKeys / (32 * kChunk);
  const int32_t lane = static_cast<int32_t>(threadIdx.x % 32);
  uint2 x[kRows][kSteps];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int32_t key = (step * 32 + lane) * kChunk;
      x[i][step] = {0, 0};
      if (i < rows && key < keys) x[i][step] = *reinterpret_cast<const uint2*>(from + i * row + key);
    }
  }
  TileBits bits{0, 0};
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const bool used = (step * 32 + lane) * kChunk < keys;
    uint32_t any = 0, all = 0x80808080u;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const uint2 own = x[i][step];
      any |= own.x | own.y;
      if (i < rows && used) all &= nonzero_bytes(own.x) & nonzero_bytes(own.y);
    }
    const uint32_t some = __ballot_sync(~0u, any != 0), whole = __ballot_sync(~0u, all == 0x80808080u);
    constexpr uint32_t kOfTile = (1u << kChunkLanes) - 1;
#pragma unroll
    for (int tile = 0; tile < 32 / kChunkLanes; ++tile) {
      const int at = step * 32 / kChunkLanes + tile;
      bits.any |= static_cast<uint32_t>((some >> tile * kChunkLanes & kOfTile) != 0) << at;
      bits.all |= static_cast<uint32_t>((whole >> tile * kChunkLanes & kOfTile) == kOfTile) << at;
    }
  }
  return bits;
}

// The same, element by element, for any strides.
__device__ TileBits bits_of_elements(const uint8_t* from, int64_t row, int64_t column, int32_t rows,
                                     int32_t keys) {
  const int32_t lane = static_cast<int32_t>(threadIdx.x % 32);
  uint32_t any = 0, hidden = 0;
#pragma unroll 1
  for (int i = 0; i < min(kRows, rows); ++i) {
#pragma unroll
    for (int step = 0; step < kKeys / 32; ++step) {
      const int32_t key = step * 32 + lane;
      if (key >= keys) continue;
      const bool sees = from[i * row + key * column] != 0;
      any |= static_cast<uint32_t>(sees) << step * 32 / kRowBlock;
      hidden |= static_cast<uint32_t>(!sees) << step * 32 / kRowBlock;
    }
  }
  for (int apart = 1; apart < 32; apart *= 2) {
    any |= __shfl_xor_sync(~0u, any, apart);
    hidden |= __shfl_xor_sync(~0u, hidden, apart);
  }
  return {any, ~hidden};
}

// A CTA classifies kTiles tiles. `groups`: CTAs per row of tiles.
__global__ void __launch_bounds__(32 * kWarps)
    find_mask_tiles(const __grid_constant__ Problem p, const __grid_constant__ MaskTiles to,
                    uint32_t groups) {
  __shared__ TileBits of_warp[kWarps];
  ptx::let_next_kernel_start();
  const auto thread = static_cast<int32_t>(threadIdx.x), warp = thread / 32;
  const uint32_t group = blockIdx.x % groups, rows_before = blockIdx.x / groups;
  const uint32_t entry = rows_before / to.rows, tile_row = rows_before % to.rows;
  const uint32_t heads = to.head ? p.heads : 1, batches = to.batch ? p.batch : 1;
  const uint32_t head = entry % heads, batch = entry / heads % batches, leading = entry / heads / batches;
  const View& mask = p.mask;
  const auto first = static_cast<int32_t>(tile_row * kRowBlock + warp * kRows),
             key = static_cast<int32_t>(group * kKeys);
  const int32_t rows = (mask.row ? p.q_rows : 1) - first, keys = p.k_rows - key;
  const uint8_t* const of_head =
      mask.as<const uint8_t>() + mask.leading_offset(p.leading, leading) + mask.offset(batch, head, 0);
  const uint8_t* const from = of_head + first * mask.row + key * mask.column;
  const MaskRows whole{of_head, mask.row, mask.column, p.k_rows};
  const TileBits own = whole.in_chunks() ? bits_of_chunks(from, mask.row, rows, keys)
                                         : bits_of_elements(from, mask.row, mask.column, rows, keys);
  if (thread % 32 == 0) of_warp[warp] = own;
  __syncthreads();
  const int32_t column = static_cast<int32_t>(group) * kTiles + thread;
  if (thread >= kTiles || column >= to.columns) return;
  uint32_t any = 0, all = ~0u;
  for (const TileBits& bits : of_warp) any |= bits.any, all &= bits.all;
  const SeenPiece seen = seen_piece_of(any >> thread & 1, all >> thread & 1);
  to.seen[int64_t{rows_before} * to.columns + column] = static_cast<uint8_t>(seen);
}

}  // namespace

cudaError_t launch_mask_tiles(const Problem& p, const MaskTiles& tiles, cudaStream_t stream) {
  const auto groups = static_cast<uint32_t>(ceil_div(tiles.columns, kTiles));
  return launch(find_mask_tiles, tiles.heads * tiles.rows * groups, 32 * kWarps, 0, stream, p, tiles, groups);
}

}  // namespace jax_flash
