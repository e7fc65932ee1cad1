// The parts of a consumer's step in cuda/backward/hopper.cuh: lse and delta of the queries, the products S
// and dP, the tile of S that a score variant works on, P, and −delta as the start of dP.
#pragma once

#include <cstdint>

#include "cuda/backward/hopper_state.cuh"
#include "cuda/backward/query_step.cuh"
#include "cuda/gradient.cuh"
#include "cuda/mask.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/score/ranges.cuh"
#include "cuda/tile/accumulator.cuh"
#include "cuda/tile/shared_tile.cuh"

namespace jax_flash {

// lse and delta of a step's queries, from shared memory.
template <class S, int M>
struct StepRows {
  const float* first;  // lse of the lane's first query
  int32_t has_large_lse_;

  __device__ __forceinline__ StepRows(const QueryStatistics<M>& statistics, int32_t large_lse)
      : first(statistics.lse + ptx::lane_index() % 4 * 2), has_large_lse_(large_lse) {}
  __device__ __forceinline__ float lse(int slot) const { return first[S::row_step(slot)]; }
  __device__ __forceinline__ float delta(int slot) const { return first[M + S::row_step(slot)]; }
  __device__ __forceinline__ bool has_large_lse() const { return uniform(has_large_lse_); }
};

// In kernels that mark steps, `large_lse` of a stage has one more bit for each consumer: whether some row of
// the step does not see all of the consumer's keys.
__device__ __forceinline__ bool is_partial_of(const int32_t& large_lse, int consumer) {
  return uniform(large_lse) >> (1 + consumer) & 1;
}
template <class C>
inline constexpr bool kPlainSteps = C::kKind == ScoreKind::kPlain || kMarksSteps<C>;

// Which of a warp's 16 keys each row of a step sees by a boolean mask or ranges, and by the band. It is
// fetched while S is multiplied. Kernels of other kinds fetch nothing.
template <class C>
struct SeenByStep {
  static constexpr bool kFetched = C::kKind == ScoreKind::kListedMask || C::kKind == ScoreKind::kRanges;
  static constexpr int kWords = kFetched ? C::kM / 64 : 1, kKeys = MaskRows::kKeys;
  // One word for every 64 rows: lane l has a bit per key for row l and, in the high half, for row l + 32.
  uint32_t of_rows[kWords];

  template <class Tile>
  __device__ __forceinline__ void fetch(const Problem& p, const Tile& tile, const QueryStep& step,
                                        int32_t key) {
    if constexpr (C::kKind == ScoreKind::kRanges) {
      const int32_t row = step.tile * C::kM + static_cast<int32_t>(ptx::lane_index());
      const RowRanges ranges = tile.score.row_ranges(p, step.head);
      LimitsOfRow limits[2 * kWords];
#pragma unroll
      for (int i = 0; i < 2 * kWords; ++i) limits[i].load(ranges, min(row + 32 * i, tile.band.q_len - 1));
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        const auto bits = [&](int half) {
          const Interval keys = tile.band.row(row + 64 * i + 32 * half);
          return limits[2 * i + half].bits(intersect(keys, {key, key + kKeys}), key);
        };
        of_rows[i] = bits(0) | bits(1) << kKeys;
      }
    } else {
      const MaskRows mask = tile.score.mask(p, step.head);  // before `row`, or a register spills at d256
      const int32_t row = step.tile * C::kM + static_cast<int32_t>(ptx::lane_index());
#pragma unroll
      for (int i = 0; i < kWords; ++i)
        of_rows[i] = mask.bits_of_two(row + 64 * i, row + 64 * i + 32, tile.band, key);
    }
  }
  // S ← −inf where the bit of a row and key is 0.
  template <class S>
  __device__ __forceinline__ void hide(S& s) const {
    constexpr int kSlots = 8;  // of 32 rows
    if constexpr (C::kKind == ScoreKind::kRanges) {
      bool all = true;
#pragma unroll
      for (uint32_t own : of_rows) all &= own == ~0u;
      if (__all_sync(~0u, all)) return;
    }
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
        const uint32_t lane = S::row_step(slot) + ptx::lane_index() % 4 * 2;
        const uint32_t own = __shfl_sync(~0u, of_rows[i], lane) >> S::column(0);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int e = 0; e < 2; ++e)
            if (!(own >> (kKeys * half + S::column_step(0, e)) & 1))
              s.at((2 * i + half) * kSlots + slot, 0, e) = -INFINITY;
        }
      }
    }
  }
};

// S ← −inf where the band, ranges, blocks or the mask hide a step's keys from its rows. A warp's keys are of
// one block.
template <class C, class S, class Tile>
__device__ __forceinline__ void hide_unseen_keys(S& s, const Problem& p, const Tile& tile,
                                                 const QueryStep& step, int32_t key,
                                                 const SeenByStep<C>& seen) {
  const Band& band = tile.band;
  const int32_t row = step.tile * C::kM;
  if constexpr (SeenByStep<C>::kFetched) {
    seen.hide(s);
  } else if constexpr (C::kKind == ScoreKind::kBlocks) {
    const BlockMask blocks = tile.score.mask(p, step.head);
    SeenByLanes<S> of_rows;
    of_rows.find(row, key, [&](int32_t i) {
      const bool sees = i < band.q_len && blocks.sees(0, i, key);
      return SeenKeys{sees ? intersect(band.row(i), {key, key + S::kColumns}) : Interval{0, 0}, {0, 0}};
    });
    hide_unseen_transposed(s, of_rows);
  } else {
    mask(s, band, row, key);
  }
}

template <class C>
inline constexpr int32_t kLargeLseMask = kMarksSteps<C> ? 1 : -1;

// The tile of S of a step, for its score variant.
template <class Consumer>
struct StepTile {
  using Score = typename Consumer::Config::Score;
  const Consumer& warpgroup;
  const QueryStep& step;
  const Problem& p = warpgroup.p;
  const int32_t key = warpgroup.key();

  __device__ __forceinline__ auto operands() const {
    return warpgroup.tile().score.template of_head<Score>(p, warpgroup.tile().work, step.head);
  }
  __device__ __forceinline__ const Band& band() const { return warpgroup.tile().band; }
  __device__ __forceinline__ int32_t row() const { return step.tile * Consumer::Config::kM; }
  // Compares the segments of the rows, which the statistics warp has found, with those of this warp's keys.
  __device__ __forceinline__ InSegment in_segment() const
    requires(kStagesSegments<typename Consumer::Config>)
  {
    if (!p.q_segment_ids || key >= band().k_len) return InSegment::kAll;
    const auto& segments = warpgroup.shared.segments;
    return compare_ranges(segments.rows[step.number % Consumer::Config::kStages],
                          segments.keys[warpgroup.warp_index()]);
  }
  // Bias and mask (load/score_tiles.cuh).
  template <class S, class Add>
    requires(kStagesTiles<typename Consumer::Config>)
  __device__ __forceinline__ void apply_tiles(S& s, Add add) const {
    const int column = static_cast<int>(warpgroup.consumer * kConsumerRows + Consumer::warp_row());
    warpgroup.shared.score_pipe.wait_full(step.number);
    Consumer::Config::Tiles::apply(s, warpgroup.shared, p, 0, column, step.number, add);
    warpgroup.shared.score_pipe.release(step.number);
  }
};

// Sᵀ → Pᵀ = 2^(scale · Sᵀ − lse), with a step's lse in shared memory; gradient.cuh says what happens if lse
// is too large. kMask: which bits of large_lse count.
template <int32_t kMask = -1, class S>
__device__ __forceinline__ void probabilities_of_keys(S& s, const float* lse, const int32_t& large_lse,
                                                      float scale) {
  const auto* pairs = reinterpret_cast<const float2*>(lse) + ptx::lane_index() % 4;
#pragma unroll
  for (int slot = 0; slot < S::kSlots; slot += 2) {
    const float2 l = pairs[2 * slot];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      s.at(slot, 0, e) = fmaf(s.at(slot, 0, e), scale, -l.x);
      s.at(slot + 1, 0, e) = fmaf(s.at(slot + 1, 0, e), scale, -l.y);
    }
  }
  if (__builtin_expect(uniform(large_lse) & kMask, false))
    for_each(s, [&](float& x, int slot, int, int) { clamp_for_large_lse(x, lse[S::row(slot)]); });
  for_each(s, [&](float& x, int, int, int) { x = ptx::exp2(x); });
}

// Starts dPᵀ − delta with −delta, from shared memory; the product dPᵀ is added to it.
template <class S>
__device__ __forceinline__ void start_from_delta(S& dp, const float* negative_delta) {
  const auto* pairs = reinterpret_cast<const float2*>(negative_delta) + ptx::lane_index() % 4;
#pragma unroll
  for (int slot = 0; slot < S::kSlots; slot += 2) {
    const float2 d = pairs[2 * slot];
#pragma unroll
    for (int e = 0; e < 2; ++e) dp.at(slot, 0, e) = d.x, dp.at(slot + 1, 0, e) = d.y;
  }
}

// K ← 0 and V ← 0 in rows that are not in use. All consumers call this.
template <class C>
__device__ __forceinline__ void clear_keys(typename C::Shared& shared, uint32_t tile, int32_t count) {
  constexpr int kThreads = C::kConsumers * kWarpgroup;
  const int thread = ptx::thread_index() - kWarpgroup;
  const auto is_clean = [count](int row) { return row < count; };
  clear_rows<typename C::KTile>(shared.keys(tile), is_clean, thread, kThreads);
  clear_rows<typename C::VTile>(shared.values(tile), is_clean, thread, kThreads);
  ptx::fence_async_shared();
  __syncwarp();  // lanes have cleared different numbers of chunks, and bar.sync needs converged warps
  ptx::sync_group(1, kThreads);
}

// Issues Sᵀ = K Qᵀ or dPᵀ = V dOᵀ  [64, M]; with kAdds, adds the product to `to`. `rows`: a descriptor or
// fragments.
template <class T, bool kAdds = false, class Scores, class Rows, class Columns>
__device__ __forceinline__ void start_scores(Scores& to, const Rows& rows, const Columns& columns) {
  using Product = ptx::Wgmma<T, Scores::kRows>;
  ptx::wgmma_fence();
  Product::template multiply<!kAdds>(to.x[0], rows.at(0), columns.at(0));
#pragma unroll
  for (int step = 1; step < Columns::kSteps; ++step)
    Product::template multiply<false>(to.x[0], rows.at(step), columns.at(step));
  ptx::wgmma_commit();
}

// Where a lane of a consumer stores dSᵀ of a step. Waits until no product reads the stage.
template <class Consumer>
__device__ __forceinline__ auto empty_ds(const Consumer& of, uint32_t use) {
  using C = typename Consumer::Config;
  if constexpr (C::kReleasesDs) of.shared.ds_pipe.wait_empty(use);
  return LaneAddress<typename C::DsTile>(ptx::shared_address(of.shared.ds[use % C::kDsStages]),
                                         of.consumer * kConsumerRows + of.warp_row() + of.lane() % 16,
                                         of.lane() / 16);
}

}  // namespace jax_flash
