// The segments of a key tile for the sm_90a forward. A producer warp computes them ahead of the consumers.
#pragma once

#include <cstdint>

#include "cuda/hopper/pipeline.cuh"
#include "cuda/hopper/roles.cuh"
#include "cuda/hopper/tile_scheduler.cuh"
#include "cuda/score/segment_ranges.cuh"
#include "cuda/score/segments.cuh"
#include "cuda/score/variant.cuh"
#include "cuda/work.cuh"

namespace jax_flash {

// The keys' segments, and for each consumer warp whether its 16 rows have to compare them with their own.
//
// Nothing is staged for query tiles that see only keys of their own segment.
template <int N, int kConsumers>
struct SegmentInput {
  static constexpr int kRowBlocks = kConsumerWarps * kConsumers;
  struct Map {};
  struct Tile {
    int32_t key_segments[N];
    uint32_t mixed;  // a bit for each row block: some key and some row have different segments
  };
  static constexpr int kStages = 2, kBytes = 1024;  // kBytes: upper bound; the end is aligned
  static constexpr int kWarps = 1;
  static constexpr bool kLoaded = false, kSkipsUniformTiles = true;
  struct Buffer {};
  struct Pipe : Pipeline<kStages> {
    Tile tiles[kStages];

    __device__ __forceinline__ void init(uint32_t releases) { Pipeline<kStages>::init(releases, 32); }
  };
  static cudaError_t make_map(Map&, const Problem&) { return cudaSuccess; }

  // S ← −inf where key and row have different segments. Unused rows and keys may keep any score.
  template <class S, class Shared>
  __device__ __forceinline__ static void hide(S& s, const Shared& shared, const SegmentOperands& operands,
                                              const Band& band, int consumer, int32_t row, uint32_t use) {
    shared.input_pipe.wait_full(use);
    const Tile& tile = shared.input_pipe.tiles[use % kStages];
    const int32_t warp = uniform(4 * consumer + static_cast<int>(threadIdx.x) % 128 / 32);
    if (tile.mixed >> warp & 1) {
      int32_t row_segments[S::kSlots];
#pragma unroll
      for (int slot = 0; slot < S::kSlots; ++slot)
        row_segments[slot] = operands.q_segments[min(row + S::row(slot), band.q_len - 1)];
      const uint32_t key_segments = ptx::shared_address(tile.key_segments + S::column(0));
#pragma unroll
      for (int j = 0; j < 2 * S::kColumnTiles; ++j) {
        const auto segment =
            static_cast<int32_t>(ptx::load_shared(key_segments + 4 * (S::column_step(j / 2) + j % 2)));
#pragma unroll
        for (int slot = 0; slot < S::kSlots; ++slot)
          hide_other_segment(s.at(slot, j / 2, j % 2), segment, row_segments[slot]);
      }
    }
    shared.input_pipe.release(use);
  }

  // The warp that scans the keys' segments.
  template <class Shared>
  struct SegmentWarp {
    const Problem& p;
    Shared& shared;
    uint32_t use = 0;

    // The range of this lane's 16 rows.
    __device__ __forceinline__ static SegmentRange row_range(const int32_t* segments, int32_t row,
                                                             int32_t q_len) {
      SegmentRange range{0, 0};
      if (row >= q_len) return range;
      range.lo = range.hi = segments[row];
#pragma unroll
      for (int32_t i = 1; i < 16; ++i) {  // all loads are in flight at once
        const int32_t segment = segments[min(row + i, q_len - 1)];
        range.lo = min(range.lo, segment), range.hi = max(range.hi, segment);
      }
      return range;
    }

    // This lane's keys of tile n, or of the first one.
    static constexpr int kKeys = (N + 31) / 32;
    __device__ __forceinline__ static void read(int32_t (&segments)[kKeys], const int32_t* key_segments,
                                                int32_t k_len, int32_t n) {
      const int32_t lane = static_cast<int32_t>(threadIdx.x % 32), last = k_len - 1;
#pragma unroll
      for (int32_t j = 0; j < kKeys; ++j)
        segments[j] = key_segments[min(max(n, 0) * N + 32 * j + lane, last)];
    }

    // Scans key tile n, whose segments were read to `segments`. `rows`: this lane's row block, if it is used.
    __device__ __forceinline__ void scan(int32_t (&segments)[kKeys], const int32_t* key_segments,
                                         int32_t k_len, int32_t n, const SegmentRange& rows, bool used) {
      shared.input_pipe.wait_empty(use);
      Tile& tile = shared.input_pipe.tiles[use % kStages];
      const auto lane = static_cast<int32_t>(threadIdx.x % 32);
      SegmentRange keys{INT32_MAX, INT32_MIN};
#pragma unroll
      for (int32_t j = 0; j < kKeys; ++j) {
        if (N % 32 != 0 && 32 * j + lane >= N) break;
        tile.key_segments[32 * j + lane] = segments[j];
        keys.lo = min(keys.lo, segments[j]), keys.hi = max(keys.hi, segments[j]);
      }
      read(segments, key_segments, k_len, n - 1);
      keys = {__reduce_min_sync(~0u, keys.lo), __reduce_max_sync(~0u, keys.hi)};
      const bool equal = rows.lo == rows.hi && keys.lo == keys.hi && rows.lo == keys.lo;
      const uint32_t mixed = __ballot_sync(~0u, used && !equal);
      if (lane == 0) tile.mixed = mixed;
      shared.input_pipe.arrive(use);  // every lane arrives, because each has written
      ++use;
    }

    // Scans all key tiles of a query tile.
    __device__ __forceinline__ void scan(const BlockWork& work, const Band& band, const Interval& tiles) {
      const auto segments_of = [&](const View& view) {
        return view.as<const int32_t>() + work.offset(p, view, work.head, 0);
      };
      const auto lane = static_cast<int32_t>(threadIdx.x % 32);
      const int32_t row = work.tile.row + 16 * lane;
      const bool used = lane < kRowBlocks && row < band.q_len;
      const int32_t* const key_segments = segments_of(p.kv_segment_ids);
      const SegmentRange rows = row_range(segments_of(p.q_segment_ids), row, used ? band.q_len : 0);
      if (tiles.empty()) return;
      int32_t segments[kKeys];
      read(segments, key_segments, band.k_len, tiles.hi - 1);
      for (int32_t n = tiles.hi - 1; n >= tiles.lo; --n)
        scan(segments, key_segments, band.k_len, n, rows, used);
    }

    __device__ __forceinline__ void run() {
      for (uint32_t tile_index = 0;; ++tile_index) {
        shared.state_pipe.wait_full(tile_index);
        const auto& tile = shared.tiles[tile_index % kTileStates];
        if (tile.done) return;
        if (!tile.one_segment) scan(tile.work, tile.band, tile.tiles);
        shared.state_pipe.release(tile_index);
      }
    }
  };
};

}  // namespace jax_flash
