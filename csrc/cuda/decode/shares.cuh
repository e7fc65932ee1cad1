// Decode in equal shares of all key tiles, for sequences of unequal lengths. Each warp of a CTA has a ring of
// its own (ring.cuh). The warps synchronise only at the end of a sequence, or of the CTA's part of it.
#pragma once

#include "core/families/portable_layout.h"
#include "cuda/decode/combine.cuh"
#include "cuda/decode/partition.cuh"
#include "cuda/decode/results.cuh"
#include "cuda/decode/ring.cuh"
#include "cuda/decode/warp_attention.cuh"
#include "cuda/decode/warp_merge.cuh"
#include "cuda/ptx/dependent.cuh"
#include "cuda/ptx/shared.cuh"

namespace jax_flash::decode {

// A row of csrc/kernels.def: M query rows of a KV head, and N keys per tile of the whole block. Stored: T, or
// uint8_t for float8, whose rings have twice as many stages in the same memory. kOptions: whether there are
// score options. kPageScales: whether float8 pages have scales of their own.
template <class T, class Stored, Row R, bool kOptions, bool kPageScales>
struct DecodeShares {
  using Element = T;
  static constexpr int kHeadDim = R.head_dim, kValueDim = R.value_dim, kRows = R.block_m;
  static constexpr int kWarps = R.warps, kThreads = kWarps * 32, kBlocks = R.blocks;
  static constexpr bool kFloat8 = sizeof(Stored) < sizeof(T),
                        kScalesInStage = kPageScales && decode_scales_replace_stage(R);
  // Tiles of N keys that form one tile of this kernel.
  static constexpr int kRowTiles = kFloat8 ? decode_float8_tiles(R) : 1;
  static constexpr int kTile = kRowTiles * R.block_n, kKeys = kTile / kWarps;
  static constexpr int kStages = kFloat8 ? decode_float8_stages(R) - kScalesInStage : R.stages;
  using Rows = std::conditional_t<kOptions, RowsWithOptions, ColumnRows>;
  using Ring = WarpRing<Stored, kHeadDim, kValueDim, kStages, kKeys, kTile, kRows <= 16,
                        decode_prefetches_table(kRows, kHeadDim), kPageScales, Rows>;
  using Score = DecodeScore<TransposedAccumulator<kKeys / 16, kRows / 8>, kOptions>;
  using WarpState =
      WarpAttention<T, Stored, kHeadDim, kValueDim, kKeys, kRows / 8, kWarps, Score, kPageScales>;
  static constexpr DecodeLayout kLayout = decode_layout(R, sizeof(T));
  static constexpr int kMergeColumns = decode_merge_columns(R), kMergePitch = decode_merge_pitch(R);
  static constexpr int kSharedBytes = kPageScales ? kLayout.bytes : kLayout.scales;
  static_assert(kLayout.warp_ring >= Ring::kBytes + (kScalesInStage ? Ring::kScaleBytes : 0) &&
                sizeof(Softmax) == 2 * sizeof(float));
  static_assert(sizeof(PartitionShared<kThreads>) + sizeof(bool) <= kBlockStateBytes);
  static_assert(kKeys % 16 == 0 && kRows % 8 == 0 && kValueDim % kMergeColumns == 0);
  static_assert(!kPageScales || kFloat8);
};

// Writes the results of a segment whose tiles all warps have attended to, or merges them with those of the
// sequence's other parts if this one is the last to be finished.
template <class C>
__device__ __forceinline__ void finish_segment(const DecodeCall& call, const ColumnRows& rows, int32_t column,
                                               const Segment& segment, typename C::WarpState& state,
                                               WarpMerge<C> merge, bool& is_last) {
  const SequenceWork& work = segment.work;
  const Parts parts = segment.parts;
  const PartialResults<C::kRows> partial(call);
  const int64_t first = partial.row(parts.slot(call.grid, parts.own), column, 0);
  merge.run(state, rows.count(), [&](int32_t row, int32_t feature, float4 o, Softmax softmax) {
    if (feature >= call.value_dim || !is_written(call, rows, work, row)) return;
    if (parts.count == 1)
      return store_result<typename C::Element>(call, rows, work, row, feature, o, softmax);
    *reinterpret_cast<float4*>(partial.o + (first + row) * partial.width + feature) = o;
    if (feature == 0) partial.softmax[first + row] = softmax;
  });
  if (parts.count == 1) return;
  if (threadIdx.x == 0) is_last = count_part(partial.counter(parts, column), parts.count);
  __syncthreads();
  constexpr int kAtOnce = C::kRows <= 16 ? 8 : 4;  // parts that are loaded together, limited by registers
  if (is_last) combine<C, kAtOnce>(call, rows, work, partial, parts, column);
}

// A whole CTA calls this.
template <class C>
__device__ __forceinline__ void attend_share(const DecodeCall& call) {
  using Ring = typename C::Ring;
  __shared__ PartitionShared<C::kThreads> found;
  __shared__ bool is_last;
  uint8_t* const shared = ptx::dynamic_shared();
  const int32_t warp = static_cast<int32_t>(threadIdx.x) / 32;
  const int32_t number = call.columns.quotient(static_cast<int32_t>(blockIdx.x));
  const int32_t column = static_cast<int32_t>(blockIdx.x) - number * call.columns.value;
  const auto rows = C::Rows::of_column(call, column, C::kRows);
  if (call.starts && !are_in_order(call)) return;
  if (C::Rows::kSkips && call.lists) ptx::wait_for_kernel_before();  // which makes the lists
  Range range;
  const Partition partition = find_range<C::kTile, C::kThreads>(call, rows, found, number, range);
  if (range.begin >= range.end) return;

  Segment* const queue = reinterpret_cast<Segment*>(shared + C::kLayout.segments) + warp * Ring::kSegments;
  const uint32_t memory = ptx::shared_address(shared);
  const uint32_t stages = memory + warp * C::kLayout.warp_ring;
  const uint32_t scales =
      C::kScalesInStage ? stages + Ring::kBytes : memory + C::kLayout.scales + warp * Ring::kScaleBytes;
  Ring ring(stages, memory + C::kLayout.pages + warp * Ring::kEntryBytes, scales, queue, call, rows,
            partition, range, number);
  typename C::WarpState state;
  if constexpr (C::WarpState::kSharedQueries)
    state.shared_q = reinterpret_cast<uint2*>(shared + C::kLayout.queries);
  const Segment* segment = nullptr;
  Interval keys{0, 0};  // the keys of the segment's sequence
  int32_t tile = 0, tile_end = 0;
#pragma unroll 1  // short code, because a kernel's first instructions are fetched from memory
  for (int ahead = -Ring::kStages;;) {
    ring.fill();
    if (++ahead <= 0) continue;
    if (tile == tile_end) {
      const Segment* const ended = segment;
      const bool ends = ring.done();
      if (!ends) segment = &ring.next_segment();
      // The next queries arrive while results are merged.
      if (!ends && !C::WarpState::kSharedQueries) state.load(call, rows, segment->work);
      if (ended) {
        finish_segment<C>(call, rows, column, *ended, state, WarpMerge<C>(shared), is_last);
        if (ends) return;
      }
      if (C::WarpState::kSharedQueries) state.load(call, rows, segment->work);
      state.begin(call, rows, segment->work);
      tile = segment->tile, tile_end = segment->tile_end, keys = segment->work.keys;
      if (threadIdx.x == 0 && segment->parts.count > 1)
        prepare_counter(PartialResults<C::kRows>(call).counter(segment->parts, column));
    }
    const ListedTile seen = SeenTiles<C::kTile, C::Rows::kSkips>{call, segment->work}.at(tile);
    const int32_t key = seen.number * C::kTile + warp * Ring::kKeys;
    const uint32_t k = ring.wait();
    state.page_scales.load(call.scaled_by_page, ring.scales());
    const SeenPiece piece = seen.part<C::kWarps>(warp);
    if (piece != SeenPiece::kNone && key < keys.hi && key + Ring::kKeys > keys.lo)
      state.step(call, rows, segment->work, key, k, k + Ring::KTile::kBytes, piece == SeenPiece::kSome);
    __syncwarp();
    ++tile;
  }
}

}  // namespace jax_flash::decode
