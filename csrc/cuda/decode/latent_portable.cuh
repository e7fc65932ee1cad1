// Decode over latent pools by mma.sync: the absorbed form of multi-head latent attention (DeepSeek-V2).
//
// A tile of keys is K and, in its first columns, V. Some warps load tiles ahead (latent_load.cuh). Eight
// warps work on one tile together, so that they release its stage soon:
//
//   S = Q Kᵀ       the warps divide row tiles, key tiles and, if these are few, the head dim
//   P = 2^(S − m)  each warp takes every eighth row, and each lane one key
//   O ← α O + P V  each warp takes 64 of O's columns
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "core/families/latent_layout.h"
#include "cuda/decode/latent_call.cuh"
#include "cuda/decode/latent_load.cuh"
#include "cuda/decode/latent_state.cuh"
#include "cuda/decode/results.cuh"
#include "cuda/decode/row_max.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/registry.h"
#include "cuda/score/alibi.cuh"
#include "cuda/score/softcap.cuh"
#include "cuda/tile/fragments.cuh"

namespace jax_flash::decode::inline JF_ARCH_NAMESPACE {

template <class C>
struct LatentWarpsShared;

// A row of csrc/kernels.def: M query rows of a KV head, and N keys per tile.
template <class T, Row R>
struct LatentSm80 {
  using Element = T;
  static constexpr Row kRow = R;
  static constexpr int kHeadDim = R.head_dim, kValueDim = R.value_dim, kRows = R.block_m, kTile = R.block_n;
  static constexpr int kStages = R.stages, kThreads = R.warps * 32;
  static constexpr int kWarps = latent::kProductWarps, kLoadWarps = R.warps - kWarps;
  using QTile = SharedTile<T, kRows, kHeadDim>;
  using KTile = SharedTile<T, kTile, kHeadDim>;
  using PTile = SharedTile<T, kRows, latent::kLeastTile>;  // kTile columns of it are used
  // A warp's share of S is 16 × 16, over a part of the head dim.
  static constexpr int kRowTiles = kRows / 16, kKeyTiles = kTile / 16,
                       kSplits = latent::portable_splits(kRows, kTile);
  static constexpr bool kHoldsQ = kRows == 16;  // this warp's share of Q stays in registers
  using O = Accumulator<kRowTiles, kValueDim / kWarps / 8>;
  using Column = LatentColumn<kRows, true>;
  using Shared = LatentWarpsShared<LatentSm80>;
  static_assert(kSplits * kRowTiles * kKeyTiles == kWarps && kValueDim / kWarps == 64 && kTile <= 32);
  static_assert(sizeof(PartitionShared<kThreads>) <= QTile::kBytes);
};

template <class C>
struct LatentWarpsShared : LatentTiles<C> {
  static constexpr int kPitch = latent::score_pitch(C::kTile);
  alignas(16) float scores[C::kSplits][C::kRows][kPitch];
  float alpha[C::kRows];      // factors of O's rows before P V is added
  Softmax softmax[C::kRows];  // of a segment, at its end

  __device__ __forceinline__ void init() { this->init_tiles(); }
};

// The warps of the products.
template <class C>
class LatentWarps {
 public:
  using T = typename C::Element;
  using Shared = typename C::Shared;

  __device__ __forceinline__ LatentWarps(const LatentCall& decode, Shared& memory, int32_t head)
      : call(decode), shared(memory), kv_head(head) {
    static_assert(sizeof(Shared) <= latent::portable_bytes(C::kRow) + latent::kStateBytes);
  }

  __device__ __forceinline__ void run() {
    uint32_t use = 0;
#pragma unroll 1
    for (uint32_t number = 0;; ++number) {
      shared.q_pipe.wait_full(number);
      const LatentSegment& segment = shared.segments[number % Shared::kSegments];
      if (segment.done) return;
      attend(segment, number, use);
      finish(segment);
    }
  }

 private:
  static constexpr int kOwnRows = C::kRows / C::kWarps;  // rows of P per warp

  __device__ __forceinline__ static int warp() { return static_cast<int>(threadIdx.x / 32); }
  __device__ __forceinline__ static void sync() { ptx::sync_group(1, C::kWarps * 32); }

  // Computes O, m and l of a segment.
  __device__ __forceinline__ void attend(const LatentSegment& segment, uint32_t number, uint32_t& use) {
    const ColumnRows rows = rows_of(segment, call.group, kv_head);
    const SplitProduct product(ptx::shared_address(shared.q));
    if constexpr (C::kHoldsQ) {
      queries.read(product);
      shared.q_pipe.release(number);
    }
    o.clear();
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) m[i] = -INFINITY, l[i] = 0;
    const Interval common = segment.work.band.common(rows.first_position(), segment.work.end_position(rows));
    const int32_t tile_end = segment.tile_end;
#pragma unroll 1
    for (int32_t tile = segment.tile; tile < tile_end; ++tile, ++use) {
      const ListedTile seen = listed_tile<C::kTile, true>(call, segment.work.list, tile);
      const int32_t key = seen.number * C::kTile;
      const uint32_t k = ptx::shared_address(shared.k[use % C::kStages]);
      shared.k_pipe.wait_full(use);
      multiply_keys(product, k);
      sync();
      if (!C::kHoldsQ && tile + 1 == tile_end) shared.q_pipe.release(number);
      const Hidden hidden{key < common.lo || key + C::kTile > common.hi, seen.pieces != 0};
      exponentiate(segment.work, rows, key, hidden, use);
      sync();
      multiply_values(k);
      shared.k_pipe.release(use);
    }
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) {
      const float sum = warp_sum(l[i]);
      if (lane_id() == 0) shared.softmax[row_of(i)] = {m[i], sum};
    }
  }

  // This warp's share of S = Q Kᵀ: a tile of 16 rows and 16 keys, over some k steps of each panel of the head
  // dim, or over all k steps of some panels.
  struct SplitProduct {
    static constexpr int kSteps = 4, kPanels = C::kHeadDim / 64;
    static constexpr int kPerPanel = std::max(1, kSteps / C::kSplits);
    static constexpr int kApart = std::max(1, C::kSplits / kSteps);  // distance between this warp's panels
    static constexpr int kOwnPanels = (kPanels + kApart - 1) / kApart;
    int split, row, key;
    RowsA<typename C::QTile> q;

    __device__ __forceinline__ explicit SplitProduct(uint32_t queries) {
      const int tile = warp() % (C::kRowTiles * C::kKeyTiles);
      split = warp() / (C::kRowTiles * C::kKeyTiles);
      row = tile / C::kKeyTiles * 16, key = tile % C::kKeyTiles * 16;
      q = RowsA<typename C::QTile>(queries, row);
      move_to_share<typename C::QTile>(q.lane);
    }
    // k steps are counted from this warp's first one.
    template <class Tile>
    __device__ __forceinline__ void move_to_share(LaneAddress<Tile>& lane) const {
      lane.swizzle ^= 2 * (split * kPerPanel % kSteps) << 4;
      lane.base += split / kSteps * Tile::offset(0, 2 * kSteps);
    }
    __device__ __forceinline__ bool has(int i) const {
      return kPanels % kApart == 0 || i + 1 < kOwnPanels || split / kSteps < kPanels % kApart;
    }
    static constexpr int step(int i, int j) { return i * kApart * kSteps + j; }
  };

  // The warp's share of Q, as fragments.
  struct Queries {
    uint32_t x[SplitProduct::kOwnPanels][SplitProduct::kPerPanel][4];
    __device__ __forceinline__ void read(const SplitProduct& product) {
#pragma unroll
      for (int i = 0; i < SplitProduct::kOwnPanels; ++i)
#pragma unroll
        for (int j = 0; j < SplitProduct::kPerPanel; ++j)
          if (product.has(i)) product.q.load(x[i][j], 0, SplitProduct::step(i, j));
    }
  };

  // Alternates between two sums, because each product waits for the one before it in its sum.
  __device__ __forceinline__ void multiply_keys(const SplitProduct& product, uint32_t tile) {
    using Tile = typename C::KTile;
    RowsB<Tile> k(tile, product.key);
    product.template move_to_share<Tile>(k.lane);
    Accumulator<1, 2> s[2];
    s[0].clear(), s[1].clear();
#pragma unroll
    for (int i = 0; i < SplitProduct::kOwnPanels; ++i) {
      if (!product.has(i)) continue;
#pragma unroll
      for (int j = 0; j < SplitProduct::kPerPanel; ++j) {
        const int step = SplitProduct::step(i, j), sum = (i * SplitProduct::kPerPanel + j) % 2;
        uint32_t a[4], b[4];
        k.load(b, 0, step);
        if constexpr (C::kHoldsQ) {
#pragma unroll
          for (int r = 0; r < 4; ++r) a[r] = queries.x[i][j][r];
        } else {
          product.q.load(a, 0, step);
        }
        ptx::mma<T>(s[sum].x[0][0], a, b[0], b[1]);
        ptx::mma<T>(s[sum].x[0][1], a, b[2], b[3]);
      }
    }
#pragma unroll
    for (int slot = 0; slot < 2; ++slot)
#pragma unroll
      for (int j = 0; j < 2; ++j)
        *reinterpret_cast<float2*>(
            &shared.scores[product.split][product.row + s[0].row(slot)][product.key + s[0].column(j)]) =
            make_float2(s[0].at(slot, j, 0) + s[1].at(slot, j, 0), s[0].at(slot, j, 1) + s[1].at(slot, j, 1));
  }

  __device__ __forceinline__ static int row_of(int own) { return warp() + own * C::kWarps; }

  // Whether the band, and a block mask, hide some of a tile's keys from some row.
  struct Hidden {
    bool by_band, by_blocks;
  };

  // m ← the row's bound, raised by a factor 1/α if a score exceeds it by more than kLatentSlack; P = 2^(S −
  // m); l ← α l + this lane's P. Each lane has one key of the tile.
  __device__ __forceinline__ void exponentiate(const SequenceWork& work, const ColumnRows& rows, int32_t key,
                                               Hidden hidden, uint32_t use) {
    constexpr int kWarpKeys = Shared::kWarpKeys;
    const int lane = lane_id(), column = C::kTile == 32 ? lane : min(lane, C::kTile - 1);
    const bool used = C::kTile == 32 || lane < C::kTile;
    const bool missing = shared.missing[use % C::kStages][column / kWarpKeys] >> column % kWarpKeys & 1;
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) {
      const int row = row_of(i);
      float x = 0;
#pragma unroll
      for (int split = 0; split < C::kSplits; ++split) x += shared.scores[split][row][column];
      if (missing) x = NAN;
      x = used && row < rows.count() ? score(work, rows, row, key + lane, x, hidden) : -INFINITY;
      const float top = warp_max(x);
      if (call.row_max && lane == 0) raise_row_max(call, rows, work, row, top);
      float alpha = 1;
      if (top > m[i] + kLatentSlack) {
        alpha = ptx::exp2(m[i] - top);
        m[i] = top, l[i] *= alpha;
      }
      const float p = ptx::exp2(x - (m[i] == -INFINITY ? 0 : m[i]));  // 0 while the row has seen no key
      l[i] += p;
      if (used) {
        const int offset =
            C::PTile::offset(row, lane / kChunk<T>) + lane % kChunk<T> * static_cast<int>(sizeof(T));
        *reinterpret_cast<T*>(shared.p + offset) = T(p);
      }
      if (lane == 0) shared.alpha[row] = alpha;
    }
  }

  // The score of a key, times log2(e), after softcap, ALiBi, the band and masks.
  __device__ __forceinline__ float score(const SequenceWork& work, const ColumnRows& rows, int32_t row,
                                         int32_t key, float x, Hidden hidden) const {
    x *= call.scale;
    if (call.softcap > 0) x = cap_exactly(x, call.softcap);
    if (call.alibi_slopes || call.draft_mask || call.ranges || hidden.by_band || hidden.by_blocks)
      x = option(work, rows, row, key, x, hidden.by_blocks);
    return x * kLog2e;
  }
  __device__ __forceinline__ float option(const SequenceWork& work, const ColumnRows& rows, int32_t row,
                                          int32_t key, float x, bool hides) const {
    const int32_t position = rows.position(row);
    if (!work.band.row(position).contains(key)) return -INFINITY;
    if (call.ranges && !seen_by_ranges(call, rows, work, row, {key, key + 1}).contains(key)) return -INFINITY;
    if (call.alibi_slopes) {
      const float slope = *call.alibi_slopes.at<const float>(work.leading, work.index, rows.head(row), 0);
      x = subtract_distance(x, slope, static_cast<float>(work.band.diagonal(position) - key));
    }
    if (hides && !block_mask_of(call, work).sees(rows.head(row), position, key)) return -INFINITY;
    return draft_mask_of(call, work).hides(position, key) ? -INFINITY : x;
  }

  // O ← α O + P V
  __device__ __forceinline__ void multiply_values(uint32_t tile) {
#pragma unroll
    for (int slot = 0; slot < C::O::kSlots; ++slot) {
      const float alpha = shared.alpha[C::O::row(slot)];
      if (alpha != 1) o.scale_row(slot, alpha);
    }
    multiply_add<T, C::kTile / 16>(o, RowsA<typename C::PTile>(ptx::shared_address(shared.p), 0),
                                   ColumnsB<typename C::KTile, 16>(tile, 64 * warp()));
  }

  // Writes the results of a segment, or of a part of one.
  __device__ __forceinline__ void finish(const LatentSegment& segment) {
    sync();  // waits until the softmax is stored
    const ColumnRows rows = rows_of(segment, call.group, kv_head);
    const Parts parts = segment.parts;
    const PartialResults<C::kRows> partial(call);
    const int64_t first = parts.count == 1 ? 0 : partial.row(parts.slot(call.grid, parts.own), kv_head, 0);
#pragma unroll
    for (int slot = 0; slot < C::O::kSlots; ++slot) {
      const int32_t row = C::O::row(slot);
      if (row >= rows.count() || !is_written(call, rows, segment.work, row)) continue;
      if (parts.count == 1) {
        store_row(segment.work, rows, row, slot);
      } else {
        store_partial(partial, first + row, row, slot);
      }
    }
    sync();  // waits until the softmax is read
  }
  __device__ __forceinline__ static int32_t feature(int n) { return 64 * warp() + C::O::column(n); }

  __device__ __forceinline__ void store_row(const SequenceWork& work, const ColumnRows& rows, int32_t row,
                                            int slot) {
    const int32_t head = rows.head(row), i = rows.position(row);
    const auto [factor, lse] = finish_row(call, work, head, i, shared.softmax[row]);
    T* const to = call.out.at<T>(work.leading, work.batch_row, head, work.q_begin + i);
    const bool zero = factor == 0;
#pragma unroll
    for (int n = 0; n < C::O::kColumnTiles; ++n) {
      if (feature(n) < call.value_dim)
        ptx::store_pair(to + feature(n), zero ? 0 : o.at(slot, n, 0) * factor,
                        zero ? 0 : o.at(slot, n, 1) * factor);
    }
    if (threadIdx.x < 32 && threadIdx.x % 4 == 0)
      store_lse(call, work.leading, work.batch_row, head, work.q_begin + i, lse);
  }
  __device__ __forceinline__ void store_partial(const PartialResults<C::kRows>& partial, int64_t to,
                                                int32_t row, int slot) {
#pragma unroll
    for (int n = 0; n < C::O::kColumnTiles; ++n) {
      if (feature(n) < call.value_dim)
        *reinterpret_cast<float2*>(partial.o + to * partial.width + feature(n)) =
            make_float2(o.at(slot, n, 0), o.at(slot, n, 1));
    }
    if (threadIdx.x < 32 && threadIdx.x % 4 == 0) partial.softmax[to] = shared.softmax[row];
  }

  const LatentCall& call;
  Shared& shared;
  int32_t kv_head;
  typename C::O o;
  Queries queries;
  float m[kOwnRows], l[kOwnRows];  // the bound on a row's scores, and this lane's share of Σ P
};

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1) latent_sm80(const __grid_constant__ LatentCall call) {
  auto& shared = *reinterpret_cast<typename C::Shared*>(ptx::dynamic_shared_1024());
  run_latent<C>(call, shared, [&](int32_t kv_head, LatentLoader<C> loader) {
    if (static_cast<int>(threadIdx.x) >= C::kWarps * 32) {
      loader.run();
    } else {
      LatentWarps<C>(call, shared, kv_head).run();
    }
  });
}

}  // namespace jax_flash::decode::inline JF_ARCH_NAMESPACE
