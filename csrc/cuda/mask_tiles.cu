// Classifies the tiles of a boolean mask, and packs its elements into bits (core/visible/mask_tiles.h). The
// kernel is memory-bound: it reads the mask once, 8 keys per load where strides allow that.
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

// The elements of a CTA's tiles: bit j of a row is key j of the tile. It keeps nothing unless kKept. A row
// more for each tile spreads the tiles over the banks of shared memory.
template <bool kKept>
struct TileElements {
  uint64_t rows[kKept ? kTiles : 1][kKept ? kRowBlock + 1 : 1];

  // Part n of a row, of all bits in an Unsigned.
  template <class Unsigned>
  __device__ void put(int32_t tile, int32_t row, int32_t n, Unsigned bits) {
    if constexpr (kKept) reinterpret_cast<Unsigned*>(&rows[tile][row])[n] = bits;
  }
};

// The bits of a warp's elements [rows, keys] at `from`, read 8 keys per load. Elements past the mask's end do
// not count. `first`: the warp's first row in its tiles.
template <bool kKept>
__device__ TileBits bits_of_chunks(const uint8_t* from, int64_t row, int32_t rows, int32_t keys,
                                   int32_t first, TileElements<kKept>& elements) {
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
      if constexpr (kKept) {
        const int32_t at = step * 32 + lane;
        elements.put(at / kChunkLanes, first + i, at % kChunkLanes,
                     static_cast<uint8_t>(bits_of_bytes(own.x) | bits_of_bytes(own.y) << 4));
      }
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
template <bool kKept>
__device__ TileBits bits_of_elements(const uint8_t* from, int64_t row, int64_t column, int32_t rows,
                                     int32_t keys, int32_t first, TileElements<kKept>& elements) {
  const int32_t lane = static_cast<int32_t>(threadIdx.x % 32);
  uint32_t any = 0, hidden = 0;
#pragma unroll 1
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int step = 0; step < kKeys / 32; ++step) {
      const int32_t key = step * 32 + lane;
      const bool used = i < rows && key < keys, sees = used && from[i * row + key * column] != 0;
      any |= static_cast<uint32_t>(sees) << step * 32 / kRowBlock;
      hidden |= static_cast<uint32_t>(used && !sees) << step * 32 / kRowBlock;
      if constexpr (kKept) {
        const uint32_t bits = __ballot_sync(~0u, sees);
        if (lane == 0) elements.put(step * 32 / kRowBlock, first + i, step % (kRowBlock / 32), bits);
      }
    }
  }
  for (int apart = 1; apart < 32; apart *= 2) {
    any |= __shfl_xor_sync(~0u, any, apart);
    hidden |= __shfl_xor_sync(~0u, hidden, apart);
  }
  return {any, ~hidden};
}

// The bits of a row that belong to thread t of the row's four (MaskWords).
__device__ __forceinline__ uint32_t bits_of_thread(uint64_t row, uint32_t t) {
  const auto bits_of = [&](uint64_t keys) {
    const uint32_t x = static_cast<uint32_t>(keys) >> 2 * t & 0x03030303u;
    return (x | x >> 6 | x >> 12 | x >> 18) & 0xff;
  };
  return bits_of(row) | bits_of(row >> 32) << 8;
}

// Writes the words of the CTA's tiles whose bit in `tiles` is 1. `first` points to the words of the first
// tile, `stride` is the distance to those of the next.
__device__ void write_words(const TileElements<true>& elements, uint32_t tiles, uint32_t* first,
                            int64_t stride) {
  constexpr int kParts = MaskWords::kOfTile / 32, kRowsOfPart = kRowBlock / kParts;
  const uint32_t lane = threadIdx.x % 32;
  for (uint32_t i = threadIdx.x / 32; i < kTiles * kParts; i += kWarps) {
    const uint32_t tile = i / kParts, part = i % kParts, row = part * kRowsOfPart + lane / 4;
    if (!(tiles >> tile & 1)) continue;
    const uint64_t* const rows = elements.rows[tile];
    first[tile * stride + part * 32 + lane] =
        bits_of_thread(rows[row], lane % 4) | bits_of_thread(rows[row + kRowsOfPart / 2], lane % 4) << 16;
  }
}

// A CTA classifies kTiles tiles. `groups`: CTAs per row of tiles; kKept: whether to write words.
template <bool kKept>
__global__ void __launch_bounds__(32 * kWarps)
    find_mask_tiles(const __grid_constant__ Problem p, const __grid_constant__ MaskTiles to,
                    const __grid_constant__ MaskWords words, uint32_t groups) {
  __shared__ TileBits of_warp[kWarps];
  __shared__ TileElements<kKept> elements;
  ptx::let_next_kernel_start();
  const auto thread = static_cast<int32_t>(threadIdx.x), warp = thread / 32;
  const uint32_t group = blockIdx.x % groups, rows_before = blockIdx.x / groups;
  const uint32_t entry = rows_before / to.rows, tile_row = rows_before % to.rows;
  const uint32_t heads = to.head ? p.heads : 1, batches = to.batch ? p.batch : 1;
  const uint32_t head = entry % heads, batch = entry / heads % batches, leading = entry / heads / batches;
  const View& mask = p.mask;
  const auto first = static_cast<int32_t>(tile_row * kRowBlock + warp * kRows),
             key = static_cast<int32_t>(group * kKeys);
  const int32_t in_tile = warp * kRows;
  // All rows of a tile are the same if the mask broadcasts them.
  const int32_t rows = (mask.row ? p.q_rows : kRowBlock) - first, keys = p.k_rows - key;
  const uint8_t* const of_head =
      mask.as<const uint8_t>() + mask.leading_offset(p.leading, leading) + mask.offset(batch, head, 0);
  const uint8_t* const from = of_head + first * mask.row + key * mask.column;
  const MaskRows whole{of_head, mask.row, mask.column, p.k_rows};
  const TileBits own = whole.in_chunks()
                           ? bits_of_chunks(from, mask.row, rows, keys, in_tile, elements)
                           : bits_of_elements(from, mask.row, mask.column, rows, keys, in_tile, elements);
  if (thread % 32 == 0) of_warp[warp] = own;
  __syncthreads();
  uint32_t any = 0, all = ~0u;
  for (const TileBits& bits : of_warp) any |= bits.any, all &= bits.all;
  if constexpr (kKept) {
    const auto first_tile = static_cast<int32_t>(group) * kTiles;
    // Tiles of the same rows are stored as one if the mask broadcasts their keys.
    const int32_t tiles = mask.column ? min(kTiles, to.columns - first_tile) : group == 0;
    write_words(elements, (1u << tiles) - 1, words.tile(leading, batch, head, tile_row, first_tile),
                words.column * MaskWords::kOfTile);
  }
  const int32_t column = static_cast<int32_t>(group) * kTiles + thread;
  if (thread >= kTiles || column >= to.columns) return;
  const SeenPiece seen = seen_piece_of(any >> thread & 1, all >> thread & 1);
  to.seen[int64_t{rows_before} * to.columns + column] = static_cast<uint8_t>(seen);
}

}  // namespace

cudaError_t launch_mask_tiles(const Problem& p, const MaskTiles& tiles, const MaskWords& words,
                              cudaStream_t stream) {
  const auto groups = static_cast<uint32_t>(ceil_div(tiles.columns, kTiles));
  const auto kernel = words.words ? find_mask_tiles<true> : find_mask_tiles<false>;
  return launch(kernel, tiles.heads * tiles.rows * groups, 32 * kWarps, 0, stream, p, tiles, words, groups);
}

}  // namespace jax_flash
