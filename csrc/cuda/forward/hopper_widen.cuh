// The tiles of float8 pages in cuda/forward/hopper.cuh. TMA loads them as they are stored, since it cannot convert, and a
// warpgroup widens them into the stages that the consumers read:
//
//   load warps  ── K, V as stored: k_pipe, v_pipe here ──►  this warpgroup  ── K, V: those of ForwardShared ──►  consumers
//
// A float8 element is exact in float16 and in bfloat16. The scales of K multiply S (WithKeyScales), because rounded
// products would change lse. The scale of V multiplies O, and scales of V by page multiply V here, rounded.
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

inline constexpr int kScaledRows = 8;  // rows of a tile that lie on one page: its boxes have multiples of these

// Stages of K and V as stored, and the scales of their rows. kWideStages: the consumers' stages.
template <int kN, int kHeadDim, int kValueDim, int kStages, int kWideStages>
struct StoredTiles {
  using KTile = SharedTile<uint8_t, kN, kHeadDim>;
  using VTile = SharedTile<uint8_t, kN, kValueDim>;
  static constexpr uint32_t kArrivals = kConsumerWarps * ptx::kWarpArrivals;  // that fill one of the consumers' stages
  // A consumer reads the scales of K after it has released K. By then the load warp may have begun with the tile that
  // follows those in all stages.
  static constexpr int kScaleStages = kStages + kWideStages + 1;
  using Scales = float[kN / kScaledRows];

  alignas(1024) uint8_t k[kStages][KTile::kBytes];
  alignas(1024) uint8_t v[kStages][VTile::kBytes];
  alignas(16) Scales k_scales[kScaleStages];
  alignas(16) Scales v_scales[kStages];
  Pipeline<kStages> k_pipe, v_pipe;

  __device__ __forceinline__ void init() {
    constexpr uint32_t kWarpgroupReleases = kConsumerWarps * ptx::kWarpArrivals;
    k_pipe.init(kWarpgroupReleases);
    v_pipe.init(kWarpgroupReleases);
  }
  // As in ForwardShared, for the load warps.
  static constexpr uint32_t key_use(uint32_t use, int) { return use; }
  static constexpr uint32_t key_loader(uint32_t) { return 0; }
  __device__ __forceinline__ const uint8_t* key(uint32_t use, int = 0) const { return k[use % kStages]; }
  __device__ __forceinline__ const uint8_t* value(uint32_t use) const { return v[use % kStages]; }
  __device__ __forceinline__ Scales& key_scales(uint32_t use) { return k_scales[use % kScaleStages]; }
  __device__ __forceinline__ const Scales& key_scales(uint32_t use) const { return k_scales[use % kScaleStages]; }
  __device__ __forceinline__ Scales& value_scales(uint32_t use) { return v_scales[use % kStages]; }
};
struct NoStoredTiles {
  static constexpr uint32_t kArrivals = 1;
  __device__ __forceinline__ void init() {}
};

// S ← k_scale · S, for keys in float8 pages. Tile: ConsumerTile.
template <class Score>
struct WithKeyScales : Score {
  template <class S, class Tile, class Softmax>
  __device__ __forceinline__ void apply(S& s, const Tile& tile, const Softmax& softmax) {
    static_assert(kScaledRows == 8);  // the keys of a column tile
    const float* const scales = tile.key_scales();
#pragma unroll
    for (int n = 0; n < S::kColumnTiles; ++n) {
      const float scale = scales[n];
#pragma unroll
      for (int slot = 0; slot < S::kSlots; ++slot) s.at(slot, n, 0) *= scale, s.at(slot, n, 1) *= scale;
    }
    Score::apply(s, tile, softmax);
  }
};

// Reads a float8 tile and writes it as a tile of 16-bit elements, 8 of them at a time, by a warpgroup.
// scales: multiplies each 8 rows by one of these unless null.
template <class From, class To, DType kFormat>
__device__ __forceinline__ void widen_tile(uint32_t from, uint32_t to, const float* scales) {
  using T = typename To::Element;
  constexpr int kInRow = From::kColumns / 8, kPieces = From::kRows * kInRow, kSteps = kPieces / kWarpgroup;
  constexpr int kInFlight = 4;
  static_assert(kPieces % kWarpgroup == 0 && kSteps % kInFlight == 0);
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
#pragma unroll 1
  for (int first = 0; first < kSteps; first += kInFlight) {
    Float8Chunk<T> x[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int at = (first + i) * kWarpgroup + thread, row = at / kInRow, piece = at % kInRow;
      const uint2 words = ptx::load_shared_uint2(from + From::offset(row, piece / 2) + piece % 2 * 8);
      x[i].words[0] = words.x, x[i].words[1] = words.y;
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int at = (first + i) * kWarpgroup + thread, row = at / kInRow, piece = at % kInRow;
      uint4 wide = x[i].template wide<kFormat>();
      if (scales) wide = Float8Chunk<T>::scaled(wide, scales[row / kScaledRows]);
      ptx::store_shared(to + To::offset(row, piece), wide);
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
    widen_tile<typename Stored::KTile, typename C::KTile, kFormat>(
        ptx::shared_address(stored.key(use)), ptx::shared_address(shared.key(use)), nullptr);
    hand_over(stored.k_pipe, shared.k_pipe, use);
  }
  template <DType kFormat>
  __device__ __forceinline__ void widen_value(uint32_t use, bool scaled) const {
    Stored& stored = shared.stored;
    stored.v_pipe.wait_full(use);
    shared.v_pipe.wait_empty(use);
    widen_tile<typename Stored::VTile, typename C::VTile, kFormat>(
        ptx::shared_address(stored.value(use)), ptx::shared_address(shared.value(use)),
        scaled ? stored.value_scales(use) : nullptr);
    hand_over(stored.v_pipe, shared.v_pipe, use);
  }
  template <class From, class To>
  __device__ __forceinline__ static void hand_over(const From& from, const To& to, uint32_t use) {
    ptx::fence_async_shared();  // wgmma reads what threads have written
    to.arrive_by_warp(use);
    from.release(use);
  }

  template <DType kFormat>
  __device__ __forceinline__ void run() {
    const bool scaled = has_page_scales(p.v_scale);
    for (uint32_t tile_index = 0;; ++tile_index) {
      shared.state_pipe.wait_full(tile_index);
      const auto& tile = shared.tiles[tile_index % kTileStates];
      if (tile.done) return;
      const Interval tiles = tile.tiles;
      if (!tiles.empty()) widen_key<kFormat>(kv_index);
      for (int32_t n = tiles.hi - 1; n >= tiles.lo; --n, ++kv_index) {
        if (n > tiles.lo) widen_key<kFormat>(kv_index + 1);
        widen_value<kFormat>(kv_index, scaled);
      }
      shared.state_pipe.release(tile_index);
    }
  }

  __device__ __forceinline__ void run() {
    ptx::with_format(p.kv_dtype, [&]<DType kFormat>() { run<kFormat>(); });
  }
};

}  // namespace jax_flash
