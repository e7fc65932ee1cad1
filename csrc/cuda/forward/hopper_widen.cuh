// The tiles of float8 pages in cuda/forward/hopper.cuh. TMA loads them as they are stored, since it cannot
// convert, and a warpgroup widens them into the stages that the consumers read:
//
//   load warps  ── StoredTiles::k_pipe, v_pipe ──►  this warpgroup  ── ForwardShared's ──►  consumers
//
// A float8 element is exact in float16 and in bfloat16. The scales of K multiply S (WithKeyScales), because
// rounded products would change lse. The scale of V multiplies O, and scales of V by page multiply V here,
// rounded.
#pragma once

#include <cstdint>

#include "cuda/hopper/pipeline.cuh"
#include "cuda/hopper/roles.cuh"
#include "cuda/hopper/tile_scheduler.cuh"
#include "cuda/load/float8_chunk.cuh"
#include "cuda/load/page_scales.cuh"
#include "cuda/ptx/float8.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/tile/shared_tile.cuh"

namespace jax_flash {

// Stages of K and V as stored, and the scales of their rows. kWideStages: the consumers' stages.
template <int kN, int kHeadDim, int kValueDim, int kStages, int kWideStages>
struct StoredTiles {
  using KTile = SharedTile<uint8_t, kN, kHeadDim>;
  using VTile = SharedTile<uint8_t, kN, kValueDim>;
  static constexpr uint32_t kArrivals = kConsumerWarps * ptx::kWarpArrivals;  // of a warpgroup
  // A consumer reads the scales of K after it has released K. By then the load warp may have begun with the
  // tile that follows those in all stages.
  static constexpr int kScaleStages = kStages + kWideStages + 1;
  using Scales = float[kN / kScaledRows];

  alignas(1024) uint8_t k[kStages][KTile::kBytes];
  alignas(1024) uint8_t v[kStages][VTile::kBytes];
  alignas(16) Scales k_scales[kScaleStages];
  alignas(16) Scales v_scales[kStages];
  Pipeline<kStages> k_pipe, v_pipe;

  __device__ __forceinline__ void init() {
    k_pipe.init(kArrivals);
    v_pipe.init(kArrivals);
  }
  // As in ForwardShared, for the load warps.
  static constexpr uint32_t key_use(uint32_t use, int) { return use; }
  static constexpr uint32_t key_loader(uint32_t) { return 0; }
  __device__ __forceinline__ const uint8_t* key(uint32_t use, int = 0) const { return k[use % kStages]; }
  __device__ __forceinline__ const uint8_t* value(uint32_t use) const { return v[use % kStages]; }
  __device__ __forceinline__ Scales& key_scales(uint32_t use) { return k_scales[use % kScaleStages]; }
  __device__ __forceinline__ const Scales& key_scales(uint32_t use) const {
    return k_scales[use % kScaleStages];
  }
  __device__ __forceinline__ Scales& value_scales(uint32_t use) { return v_scales[use % kStages]; }
};
struct NoStoredTiles {
  static constexpr uint32_t kArrivals = 1;  // of the thread that issues the copies
  __device__ __forceinline__ void init() {}
};

// S ← k_scale · S, for keys in float8 pages. If a pool has one positive scale and the score has no option,
// the softmax's scale contains it. Tile: ConsumerTile.
template <class Score>
struct WithKeyScales : Score {
  static constexpr bool kScalesInSoftmax = !Score::kGeneral;

  template <class S, class Tile, class Softmax>
  __device__ __forceinline__ void apply(S& s, const Tile& tile, const Softmax& softmax) {
    static_assert(kScaledRows == 8);  // the keys of a column tile
    if (!kScalesInSoftmax || tile.scales_keys()) {
      const float* const scales = tile.key_scales();
#pragma unroll
      for (int n = 0; n < S::kColumnTiles; ++n) {
        const float scale = scales[n];
#pragma unroll
        for (int slot = 0; slot < S::kSlots; ++slot) s.at(slot, n, 0) *= scale, s.at(slot, n, 1) *= scale;
      }
    }
    Score::apply(s, tile, softmax);
  }
};

// Reads a float8 tile and writes it as a tile of 16-bit elements, by a warpgroup: each thread takes 8 columns
// of every kRowStep-th row. The next rows are read while the ones before are widened; with all of the loop
// unrolled, consumers would wait for instructions. kScaled: times the scales of the rows.
template <class From, class To, DType kFormat, bool kScaled>
__device__ __forceinline__ void widen_tile(uint32_t from, uint32_t to, const float* scales) {
  using Chunk = Float8Chunk<typename To::Element>;
  constexpr int kInRow = From::kColumns / 8, kRowStep = kWarpgroup / kInRow, kSteps = From::kRows / kRowStep;
  constexpr int kAtOnce = 2;
  static_assert(kWarpgroup % kInRow == 0 && kSteps % kAtOnce == 0);
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroup, row = thread / kInRow,
            piece = thread % kInRow;
  // swizzle(row + r) = swizzle(row) ^ swizzle(r) for multiples r of kRowStep, and the offsets contain
  // swizzle(row).
  const uint32_t from_offset = From::offset(row, piece / 2) + piece % 2 * 8,
                 to_offset = To::offset(row, piece);
  Chunk chunks[2][kAtOnce];
  const auto read = [&](int step, Chunk& chunk) {
    const int r = step * kRowStep;
    const uint2 x = ptx::load_shared_uint2(from + (from_offset ^ From::swizzle(r) << 4) + r * From::kPitch);
    chunk.words[0] = x.x, chunk.words[1] = x.y;
  };
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i) read(i, chunks[0][i]);
#pragma unroll 2
  for (int step = 0; step < kSteps; step += kAtOnce) {
    const int buffer = step / kAtOnce % 2;
    if (step + kAtOnce < kSteps) {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) read(step + kAtOnce + i, chunks[buffer ^ 1][i]);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int r = (step + i) * kRowStep;
      const Chunk& chunk = chunks[buffer][i];
      uint4 wide;
      if constexpr (kScaled) {
        wide = chunk.template wide<kFormat>(scales[(row + r) / kScaledRows]);
      } else {
        wide = chunk.template wide<kFormat>();
      }
      ptx::store_shared(to + (to_offset ^ To::swizzle(r) << 4) + r * To::kPitch, wide);
    }
  }
}

// The warpgroup after the consumers runs this, for the tiles in the order in which consumers wait for them.
template <class C>
struct WideningWarpgroup {
  using Stored = typename C::Stored;
  const Problem& p;
  typename C::Shared& shared;
  uint32_t kv_index = 0;  // key tiles so far

  template <DType kFormat>
  __device__ __forceinline__ void widen_key(uint32_t use) const {
    const Stored& stored = shared.stored;
    stored.k_pipe.wait_full(use);
    shared.k_pipe.wait_empty(use);
    widen_tile<typename Stored::KTile, typename C::KTile, kFormat, false>(
        ptx::shared_address(stored.key(use)), ptx::shared_address(shared.key(use)), nullptr);
    hand_over(stored.k_pipe, shared.k_pipe, use);
  }
  template <DType kFormat, bool kScaled>
  __device__ __forceinline__ void widen_value(uint32_t use) const {
    Stored& stored = shared.stored;
    stored.v_pipe.wait_full(use);
    shared.v_pipe.wait_empty(use);
    widen_tile<typename Stored::VTile, typename C::VTile, kFormat, kScaled>(
        ptx::shared_address(stored.value(use)), ptx::shared_address(shared.value(use)),
        stored.value_scales(use));
    hand_over(stored.v_pipe, shared.v_pipe, use);
  }
  template <class From, class To>
  __device__ __forceinline__ static void hand_over(const From& from, const To& to, uint32_t use) {
    ptx::fence_async_shared();  // wgmma reads what threads have written
    to.arrive_by_warp(use);
    from.release(use);
  }

  template <DType kFormat, bool kScaled>
  __device__ __forceinline__ void run() {
    for (uint32_t tile_index = 0;; ++tile_index) {
      shared.state_pipe.wait_full(tile_index);
      const auto& tile = shared.tiles[tile_index % kTileStates];
      if (tile.done) return;
      const Interval tiles = tile.tiles;
      if (!tiles.empty()) widen_key<kFormat>(kv_index);
      for (int32_t n = tiles.hi - 1; n >= tiles.lo; --n, ++kv_index) {
        if (n > tiles.lo) widen_key<kFormat>(kv_index + 1);
        widen_value<kFormat, kScaled>(kv_index);
      }
      shared.state_pipe.release(tile_index);
    }
  }

  __device__ __forceinline__ void run() {
    ptx::with_format(p.kv_dtype, [&]<DType kFormat>() {
      if (has_page_scales(p.v_scale)) {
        run<kFormat, true>();
      } else {
        run<kFormat, false>();
      }
    });
  }
};

}  // namespace jax_flash
