// What kernels with one option have in shared memory for each tile of keys, in a ring beside those of K and
// V: tiles of a bias, which the loader has copied, or segments, which a warp of the producers looks through.
#pragma once

#include <cstdint>

#include "cuda/forward/sm90_shared.cuh"
#include "cuda/segments.cuh"
#include "cuda/tile/operands.cuh"

namespace jax_flash {

// Nothing.
struct NothingBeside {
  static constexpr int kStages = 0, kBytes = 0, kWarps = 0;
  static constexpr bool kNarrows = false;
  struct Map {};
  struct Shared {};
  struct Barriers {
    __device__ __forceinline__ void init(int) {}
  };
  static cudaError_t make_map(Map&, const Problem&) { return cudaSuccess; }
};

// A 16-bit bias: tiles [64, N] of each consumer.
template <class T, int N, int Stages, int kConsumers>
struct BiasTiles {
  using Tile = SharedTile<T, kConsumerRows, N>;
  static constexpr int kStages = Stages, kTileBytes = kConsumers * Tile::kBytes,
                       kBytes = kStages * kTileBytes;
  static constexpr int kWarps = 0;  // of its own
  static constexpr bool kNarrows = false;
  static constexpr int kPanel = Tile::kPanel * 8;

  struct Map {
    CUtensorMap bias;
  };
  struct Shared {
    alignas(1024) uint8_t bias[kStages][kConsumers][Tile::kBytes];
  };
  using Barriers = Ring<kStages>;

  static cudaError_t make_map(Map& map, const Problem& p) {
    return make_tensor_map(map.bias, p, p.bias,
                           {p.k_rows, p.heads, p.q_rows, p.batch, kPanel, kConsumerRows});
  }

  // That of tile n of keys.
  template <class All>
  __device__ __forceinline__ static void load(All& shared, const Map& map, const Problem& p,
                                              const BlockWork& work, int32_t n, uint32_t use) {
    shared.beside.wait_empty(use);
    const uint32_t full = shared.beside.full_of(use);
    ptx::barrier_expect(full, kTileBytes);
    const View& view = p.bias;
    ptx::Coordinates at{0, view.head ? work.head : 0, work.tile.row, view.batch ? work.batch_row : 0,
                        view.leading[0] ? static_cast<int32_t>(work.leading) : 0};
    for (int group = 0; group < kConsumers; ++group, at.row += kConsumerRows) {
      const uint32_t tile = ptx::shared_address(shared.bias[use % kStages][group]);
#pragma unroll
      for (int column = 0; column < N; column += kPanel) {
        at.column = n * N + column;
        ptx::copy_box(tile + Tile::panel_offset(column / 8), map.bias, full, at);
      }
    }
  }

  // S ← scale · S + bias
  template <class S, class All>
  __device__ __forceinline__ static void add(S& s, All& shared, float scale, int group, uint32_t use) {
    ptx::barrier_wait(shared.beside.full_of(use), shared.beside.phase(use));
    const RowsA<Tile> rows(ptx::shared_address(shared.bias[use % kStages][group]),
                           static_cast<int>(threadIdx.x) % 128 / 32 * 16);
#pragma unroll
    for (int k = 0; k < N / 16; ++k) {
      uint32_t pairs[4];
      rows.load(pairs, 0, k);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 bias = ptx::unpack<T>(pairs[i]);
        float &even = s.at(i % 2, 2 * k + i / 2, 0), &odd = s.at(i % 2, 2 * k + i / 2, 1);
        even = fmaf(even, scale, bias.x);
        odd = fmaf(odd, scale, bias.y);
      }
    }
    shared.beside.leave(use);
  }
};

// Segments: those of the keys, and what they are to the 16 rows of each consumer warp.
template <int N, int kConsumers>
struct SegmentTiles {
  static constexpr int kRowBlocks = 4 * kConsumers;  // a bit each
  struct Map {};
  struct Tile {
    int32_t of_keys[N];
    uint32_t cut;  // the row blocks that some of the keys are hidden from
  };
  static constexpr int kStages = 2, kBytes = 1024;  // at most, and the end is aligned
  static constexpr int kWarps = 1;                  // of its own
  static constexpr bool kNarrows = true;            // another warp does, before a tile is everybody's
  struct Shared {};
  struct Barriers : Ring<kStages> {
    Tile tiles[kStages];
    Ring<kTileStates> found;  // tiles of queries, by the finder

    __device__ __forceinline__ void init(uint32_t left) {
      Ring<kStages>::init(left, 32);
      found.init(1);
    }
  };
  static cudaError_t make_map(Map&, const Problem&) { return cudaSuccess; }

  // S ← −inf where the key is of another segment than the row. Rows and keys that are not in use may keep
  // anything.
  template <class S, class All>
  __device__ __forceinline__ static void hide(S& s, All& shared, const ScoreOperands& operands,
                                              const Band& band, int group, int32_t row, uint32_t use) {
    ptx::barrier_wait(shared.beside.full_of(use), shared.beside.phase(use));
    const Tile& tile = shared.beside.tiles[use % kStages];
    const int32_t warp = uniform(4 * group + static_cast<int>(threadIdx.x) % 128 / 32);
    if (tile.cut >> warp & 1) {
      int32_t of_row[S::kSlots];
#pragma unroll
      for (int slot = 0; slot < S::kSlots; ++slot)
        of_row[slot] = operands.q_segments[min(row + S::row(slot), band.q_len - 1)];
      const uint32_t of_keys = ptx::shared_address(tile.of_keys + S::column(0));
#pragma unroll
      for (int j = 0; j < 2 * S::kColumnTiles; ++j) {
        const auto segment =
            static_cast<int32_t>(ptx::load_shared(of_keys + 4 * (S::column_step(j / 2) + j % 2)));
#pragma unroll
        for (int slot = 0; slot < S::kSlots; ++slot)
          if (segment != of_row[slot]) s.at(slot, j / 2, j % 2) = -INFINITY;
      }
    }
    shared.beside.leave(use);
  }

  // The warp that leaves a tile of queries the tiles of keys between the first and the last that may be of
  // its rows' segments.
  template <class All>
  struct Narrower {
    static constexpr int kLanes = 8, kAtOnce = 32 / kLanes;  // lanes to a tile of keys
    const Problem& p;
    All& shared;

    // Of the lanes whose tile of keys, n + lane / kLanes, may be of a segment in `rows`.
    __device__ __forceinline__ static uint32_t seen(const int32_t* of_keys, int32_t k_len, int32_t n,
                                                    const SegmentRange& rows) {
      const int32_t lane = static_cast<int32_t>(threadIdx.x % 32);
      const int32_t first = (n + lane / kLanes) * N + lane % kLanes;
      SegmentRange keys{INT32_MAX, INT32_MIN};
#pragma unroll
      for (int32_t j = 0; j < N; j += kLanes) {
        const int32_t segment = of_keys[max(0, min(first + j, k_len - 1))];
        keys.lo = min(keys.lo, segment), keys.hi = max(keys.hi, segment);
      }
#pragma unroll
      for (int apart = 1; apart < kLanes; apart *= 2) {
        keys.lo = min(keys.lo, __shfl_xor_sync(~0u, keys.lo, apart));
        keys.hi = max(keys.hi, __shfl_xor_sync(~0u, keys.hi, apart));
      }
      return __ballot_sync(~0u, rows.lo <= keys.hi && keys.lo <= rows.hi);
    }

    __device__ __forceinline__ static Interval narrow(const int32_t* of_keys, int32_t k_len, Interval tiles,
                                                      const SegmentRange& rows) {
      for (; tiles.lo < tiles.hi; tiles.lo += kAtOnce) {
        if (const uint32_t lanes = seen(of_keys, k_len, tiles.lo, rows)) {
          tiles.lo += (__ffs(lanes) - 1) / kLanes;
          break;
        }
      }
      for (; tiles.lo < tiles.hi; tiles.hi -= kAtOnce) {
        if (const uint32_t lanes = seen(of_keys, k_len, tiles.hi - kAtOnce, rows)) {
          tiles.hi -= __clz(lanes) / kLanes;
          break;
        }
      }
      return tiles.lo < tiles.hi ? tiles : Interval{0, 0};
    }

    __device__ __forceinline__ void run() {
      for (uint32_t round = 0;; ++round) {
        ptx::barrier_wait(shared.beside.found.full_of(round), shared.beside.found.phase(round));
        auto& tile = shared.tiles[round % All::kTiles];
        const bool done = tile.done;
        if (!done && !tile.tiles.empty()) {
          const TileWork& queries = tile.work.tile;
          const int32_t* const of_keys =
              p.kv_segment_ids.as<const int32_t>() + tile.work.offset(p, p.kv_segment_ids, tile.work.head, 0);
          const auto rows = SegmentRange::of<16 * kRowBlocks>(tile.score.q_segments + queries.row,
                                                              queries.used_queries() - queries.row);
          const Interval tiles = narrow(of_keys, tile.band.k_len, tile.tiles, rows);
          __syncwarp();
          if (threadIdx.x % 32 == 0) tile.narrow(tiles);
        }
        ptx::barrier_arrive_by_warp(shared.states.full_of(round));
        if (done) return;
      }
    }
  };

  // The warp that looks through them.
  template <class All>
  struct Finder {
    const Problem& p;
    All& shared;
    uint32_t use = 0;

    // This lane's 16 rows.
    __device__ __forceinline__ static SegmentRange of_rows(const int32_t* segments, int32_t row,
                                                           int32_t q_len) {
      SegmentRange range{0, 0};
      if (row >= q_len) return range;
      range.lo = range.hi = segments[row];
      for (int32_t i = row + 1; i < min(row + 16, q_len); ++i) {
        const int32_t segment = segments[i];
        range.lo = min(range.lo, segment), range.hi = max(range.hi, segment);
      }
      return range;
    }

    __device__ __forceinline__ void find(const int32_t* of_keys, int32_t k_len, int32_t n,
                                         const SegmentRange& rows, bool used) {
      shared.beside.wait_empty(use);
      Tile& tile = shared.beside.tiles[use % kStages];
      const int32_t lane = static_cast<int32_t>(threadIdx.x % 32), last = k_len - 1;
      SegmentRange keys{INT32_MAX, INT32_MIN};
#pragma unroll
      for (int32_t j = 0; j < N; j += 32) {
        if (N % 32 != 0 && j + lane >= N) break;
        const int32_t segment = of_keys[min(n * N + j + lane, last)];
        tile.of_keys[j + lane] = segment;
        keys.lo = min(keys.lo, segment), keys.hi = max(keys.hi, segment);
      }
      keys = {__reduce_min_sync(~0u, keys.lo), __reduce_max_sync(~0u, keys.hi)};
      const bool whole = rows.lo == rows.hi && keys.lo == keys.hi && rows.lo == keys.lo;
      const uint32_t cut = __ballot_sync(~0u, used && !whole);
      if (lane == 0) tile.cut = cut;
      ptx::barrier_arrive(shared.beside.full_of(use));  // each lane, of what it wrote
      ++use;
    }

    __device__ __forceinline__ void run() {
      for (uint32_t round = 0;; ++round) {
        ptx::barrier_wait(shared.states.full_of(round), shared.states.phase(round));
        const auto& tile = shared.tiles[round % All::kTiles];
        if (tile.done) return;
        const int32_t row = tile.work.tile.row + 16 * static_cast<int32_t>(threadIdx.x % 32),
                      q_len = tile.band.q_len;
        const bool used = static_cast<int>(threadIdx.x % 32) < kRowBlocks && row < q_len;
        const int32_t* const of_keys =
            p.kv_segment_ids.as<const int32_t>() + tile.work.offset(p, p.kv_segment_ids, tile.work.head, 0);
        const SegmentRange rows = of_rows(tile.score.q_segments, row, used ? q_len : 0);
        for (int32_t n = tile.tiles.hi - 1; n >= tile.tiles.lo; --n)
          find(of_keys, tile.band.k_len, n, rows, used);
        shared.states.leave(round);
      }
    }
  };
};

template <ScoreKind kKind, class T, int N, int kBiasStages, int kConsumers>
struct BesideOf {
  using type = NothingBeside;
};
template <class T, int N, int kBiasStages, int kConsumers>
struct BesideOf<ScoreKind::kBias, T, N, kBiasStages, kConsumers> {
  using type = BiasTiles<T, N, kBiasStages, kConsumers>;
};
template <class T, int N, int kBiasStages, int kConsumers>
struct BesideOf<ScoreKind::kSegments, T, N, kBiasStages, kConsumers> {
  using type = SegmentTiles<N, kConsumers>;
};

}  // namespace jax_flash
