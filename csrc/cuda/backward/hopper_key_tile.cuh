// The state of a key tile of cuda/backward/hopper.cuh: its work, its steps, and where its operands lie.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#include "core/families/hopper_layout.h"
#include "core/plan/launch_plan.h"
#include "cuda/backward/hopper_kept_sums.cuh"
#include "cuda/backward/hopper_one_key_tile.cuh"
#include "cuda/backward/query_step.cuh"
#include "cuda/backward/query_sums.cuh"
#include "cuda/gradient.cuh"
#include "cuda/hopper/band.cuh"
#include "cuda/hopper/pipeline.cuh"
#include "cuda/hopper/roles.cuh"
#include "cuda/score/operands.cuh"
#include "cuda/score/segment_ranges.cuh"
#include "cuda/tile/copy.cuh"
#include "cuda/work.cuh"

namespace jax_flash {

// Tells the compiler that the walk is the same in all lanes.
__device__ __forceinline__ QueryWalk uniform(const QueryWalk& x) {
  return {uniform(x.tiles), uniform(x.heads), uniform(x.heads_inner), uniform(x.direction)};
}

__device__ __forceinline__ GappedWalk uniform(const GappedWalk& x) {
  return {uniform(static_cast<const QueryWalk&>(x)), uniform(x.gap)};
}

// A consumer's copy of a walk. A consumer only needs the number of steps of a listed walk; the copy has that
// many tiles of one head.
template <class Walk>
__device__ __forceinline__ auto steps_of(const Walk& x) {
  return uniform(x);
}
__device__ __forceinline__ QueryWalk steps_of(const ListedWalk& x) { return {uniform(x.tiles), 1, 0, 1}; }

// Whether a kernel stages tiles of bias or mask.
template <class C>
inline constexpr bool kStagesTiles = [] {
  if constexpr (requires { typename C::Tiles; }) return C::Tiles::kStaged;
  return false;
}();

// log2 of the most query tiles that a ticket of a deterministic call covers, without clusters and with them.
// Clusters take all heads of a group at each query tile; their tickets have kTicketSteps steps at most.
inline constexpr int32_t kMostTicketShift = 1, kClusterTicketShift = 2,
                         kTicketSteps = 1 << kClusterTicketShift;

// Whether the kernel is that of cuda/backward/hopper_cluster.cuh.
template <class C>
inline constexpr bool kInClusters = requires { C::kKeyParts; };

// Whether key tiles may add to dQ in order.
template <class C>
inline constexpr bool kMayOrder = C::kOrdered || kStagesTiles<C>;

// The tables in the workspace that key tiles read.
struct KeyGrid {
  const Interval* segments;  // [entries, key_tiles]: queries that may share a segment; nullptr: no segments
  int32_t key_tiles;
  QuerySums sums;
  // In a deterministic call key tiles add to dQ in order: counts those that have added to a query tile.
  uint32_t* tickets;     // [entries, h, sums.tiles]; nullptr: in any order
  int32_t ticket_shift;  // a ticket covers 2^ticket_shift query tiles, unless consumers wait for it
  // For kernels of score kind Ranges: the keys that each block of rows sees, and for each key tile the query
  // tiles within its interval of `segments` that see none of its keys (core/visible/row_blocks.h).
  const SeenByBlock* blocks = nullptr;
  const Interval* gaps = nullptr;
  StepLists lists{};  // for kernels with listed steps
  // The parts of the query heads of a KV head. With several, the kernel has a KV head for each part, and dkey
  // and dvalue are float32.
  int32_t head_parts = 1;
};

// Whether the statistics warp marks the steps in which some row does not see all keys.
template <class C>
inline constexpr bool kMarksSteps = C::kKind == ScoreKind::kRanges || lists_tiles(C::kKind);

// Whether each key tile has an interval of queries of its own.
template <class C>
inline constexpr bool kTrimsSteps =
    !lists_tiles(C::kKind) && (C::Score::reads(Operand::kQSegmentIds) || kTakesGaps<typename C::Score>);

// Whether a consumer multiplies only the blocks of kConsumerRows rows of a step that see some of its keys
// (hopper_block_steps.cuh).
template <class C>
inline constexpr bool kSkipsBlocks =
    C::kKind == ScoreKind::kPlain && C::kCluster == 1 && C::kM % kConsumerRows == 0;

// Whether the steps of a key tile are listed, so that consumers learn them from the statistics warp.
template <class C>
inline constexpr bool kListsSteps = lists_tiles(C::kKind);

// The score's operands in a key tile's state; the plain score has none. Kernels for segments have no byte of
// shared memory left for operands that they do not read.
struct NoScoreOperands {};
template <ScoreKind kKind>
using ScoreOperandsOf = std::conditional_t<
    kKind == ScoreKind::kPlain, NoScoreOperands,
    std::conditional_t<
        kKind == ScoreKind::kSegments, SegmentOperands,
        std::conditional_t<kKind == ScoreKind::kRanges, RangeOperands,
                           std::conditional_t<kKind == ScoreKind::kBlocks, BlockOperands,
                                              std::conditional_t<kKind == ScoreKind::kListedMask,
                                                                 MaskOperands, ScoreOperands>>>>>;

// For plain scores: the blocks of kConsumerRows query rows that see some key of a consumer (kSkipsBlocks).
// Other kernels have no register left for a larger state.
template <int kConsumers>
struct SeenBlocks {
  Interval seen[kConsumers];
};
struct NoSeenBlocks {};
template <class Operands, int kConsumers>
using BlocksOf =
    std::conditional_t<std::is_same_v<Operands, NoScoreOperands>, SeenBlocks<kConsumers>, NoSeenBlocks>;

// The order of a key tile's steps.
template <class Operands>
using WalkOf = std::conditional_t<
    std::is_same_v<Operands, RangeOperands>, GappedWalk,
    std::conditional_t<std::is_same_v<Operands, BlockOperands> || std::is_same_v<Operands, MaskOperands>,
                       ListedWalk, QueryWalk>>;

// State of a key tile, written by the scheduler's thread for all roles.
template <class T, int kConsumers, class Operands, class DqRows = NoDqRows>
struct KeyTileState {
  BlockWork work;
  Band band;
  WalkOf<Operands> walk;       // the query tiles in which some row sees one of the keys
  Interval whole[kConsumers];  // query tiles in which every row sees all keys of a consumer
  [[no_unique_address]] BlocksOf<Operands, kConsumers> blocks;
  Interval seen;             // query rows that see a key of the sequence
  Interval clean;            // query rows whose Q and dO may be multiplied, because they are seen or zero
  int32_t clean_keys;        // rows of K and V that may be multiplied, because they are in use or zero
  int32_t kv_head;           // of key and value
  const float *lse, *delta;  // at the first head
  float* sums;               // dQ's accumulator, at the first head and query tile
  uint32_t* tickets;         // likewise, if dQ is added in order
  GlobalRows<T> dkey, dvalue;
  [[no_unique_address]] Operands score;  // at the first head
  [[no_unique_address]] DqRows dquery;   // at the first head

  int32_t stores_dq;  // if dQ is added in order: this tile stores it in the query tiles before this one
  int32_t done;       // no tile is left, and this state describes none

  // If dQ is added in order: whether this key tile is the first to add to a query tile's sums.
  __device__ __forceinline__ bool starts_sums(int32_t query_tile) const {
    return query_tile < uniform(stores_dq);
  }

  // Computes the rest of the state from `work`, part by part, because the thread has few registers. Returns
  // false if the tile has no rows.
  template <class C, class LetLoad>
  __device__ __forceinline__ bool prepare(const Problem& p, const KeyGrid& grid, LetLoad let_load) {
    const TileWork& tile = work.tile;
    if (tile.row >= tile.end) return false;
    done = 0;
    walk.heads = p.heads / p.kv_heads;
    const int32_t part = work.head / walk.heads;  // of a KV head, if its query heads are divided
    kv_head = C::kLoadsEarly ? head_of_part(part, grid) : part;
    reload_shared();
    if constexpr (lists_tiles(C::kKind)) {
      band = make_band(p.spec, work.sequence());  // plan() gives these kernels no call whose band moves
    } else {
      find_band(p, work, band);
    }
    reload_shared();
    if constexpr (C::kKind == ScoreKind::kRanges) {
      trim_to_ranges<C>(p, grid);
    } else if constexpr (kListsSteps<C>) {
      take_list<C>(p, grid);
    } else {
      const Interval rows =
          trim_to_segments<Over::kKeys, kTakesGaps<typename C::Score>>(
              grid.segments, grid.key_tiles, C::kN, p, work, band.queries(tile.row, tile.used_keys()))
              .any;
      walk.tiles = tiles_of(rows, C::kM);
    }
    if constexpr (C::kLoadsEarly) let_load();
    if constexpr (!kMarksSteps<C>) mark_whole_tiles<C>();
    reload_shared();
    // Rows past the operand's end are loaded as zeros. Rows of other sequences, and unused rows, may hold
    // NaN.
    seen = clean = band.queries(0, band.k_len);
    if (tile.q_begin + seen.hi >= p.q_rows) clean.hi = kAllRows;
    clean_keys = tile.k_begin + tile.k_len < p.k_rows ? max(tile.k_len - tile.row, 0) : kAllRows;
    find_rows(p, [&] { return C::kLoadsEarly ? part : kv_head; });
    if constexpr (!C::kLoadsEarly) kv_head = head_of_part(kv_head, grid);  // here other kernels spill less
    reload_shared();
    if constexpr (C::kStoresDq) {
      static_cast<GlobalRows<T>&>(dquery) = dq_rows<T>(p, work);
      if constexpr (C::kKeepsSums) {
        sums = sum_tile<C::kM>(p, grid.sums.data, int64_t{blockIdx.x} * walk.heads * grid.sums.tiles);
        dquery.before = {0, 0}, dquery.after = queries_of_next<C>();
      }
      return true;
    }
    const int64_t first = grid.sums.first_tile<C::kM>(p, work);
    sums = sum_tile<C::kM>(p, grid.sums.data, first);
    if constexpr (kMayOrder<C>) {
      if (grid.tickets) tickets = grid.tickets + first;
      stores_dq = grid.tickets && first_tile_stores(p) ? tiles_without_sums<C>() : 0;
    }
    if constexpr (C::kKind != ScoreKind::kPlain)
      score.template prepare<typename C::Score>(reload(p), work, work.head);
    return true;
  }

  // Computes the state of the key tile that follows that of `other` in its KV head.
  template <class C, class LetLoad>
  __device__ __forceinline__ void follow(const KeyTileState& other, const Problem& p, LetLoad let_load) {
    *this = other;
    work.tile.row += C::kN;
    work.tile.end = min(work.tile.row + C::kN, p.k_rows);
    if (clean_keys != kAllRows) clean_keys = max(clean_keys - C::kN, 0);
    dquery.before = walk.tiles, walk.tiles = dquery.after;
    let_load();
    dquery.after = queries_of_next<C>();
    mark_whole_tiles<C>();
  }

 private:
  // The head of K and V whose query heads have this part.
  __device__ __forceinline__ static int32_t head_of_part(int32_t part, const KeyGrid& grid) {
    return static_cast<int32_t>(static_cast<uint32_t>(part) / static_cast<uint32_t>(grid.head_parts));
  }
  static constexpr int32_t kAllRows = std::numeric_limits<int32_t>::max();

  // The query tiles that see the key tile after this one.
  template <class C>
  __device__ __forceinline__ Interval queries_of_next() const {
    reload_shared();
    const int32_t next = work.tile.row + C::kN;
    return tiles_of(band.queries(next, next + C::kN), C::kM);
  }
  // The query tiles before the result have no sum yet. In ascending order the first key tile begins all sums;
  // in descending order each key tile begins those that no key tile after it sees.
  template <class C>
  __device__ __forceinline__ int32_t tiles_without_sums() const {
    if (walk.direction < 0) return work.tile.row == 0 ? kAllRows : 0;
    const Interval next = queries_of_next<C>();
    return next.empty() ? kAllRows : next.lo;
  }
  // Finds the query tiles in which every row sees all keys of a consumer, and the blocks that see some.
  template <class C>
  __device__ __forceinline__ void mark_whole_tiles() {
#pragma unroll 1
    for (int i = 0; i < kConsumers; ++i) {
      reload_shared();
      const int32_t key = work.tile.row + i * kConsumerRows;
      const Interval all = band.common_queries(key, key + kConsumerRows);
      whole[i] = {(all.lo + C::kM - 1) / C::kM, all.hi / C::kM};
      if constexpr (kSkipsBlocks<C>) {
        reload_shared();
        blocks.seen[i] = tiles_of(band.queries(key, key + kConsumerRows), kConsumerRows);
      }
    }
  }
  // Takes the list of steps in which the mask and the band leave some key visible.
  template <class C>
  __device__ __forceinline__ void take_list(const Problem& p, const KeyGrid& grid) {
    const int64_t slot = ((work.leading * p.batch + work.batch_row) * p.kv_heads + kv_head) * grid.key_tiles +
                         work.tile.row / C::kN;
    walk.count = grid.lists.counts[slot];
    walk.tiles = {0, walk.count};
    reload_shared();
    walk.list = grid.lists.steps + slot * grid.lists.most;
  }
  // Limits the walk to the query tiles to which ranges and the band leave some key visible.
  template <class C>
  __device__ __forceinline__ void trim_to_ranges(const Problem& p, const KeyGrid& grid) {
    const TileWork& tile = work.tile;
    walk.tiles = walk.gap = {0, 0};
    if (tile.index == kNoSequence) return;
    const int64_t slot = slot_of_tile<Over::kKeys>(p, work, C::kN);
    walk.tiles = tiles_of(grid.segments[slot], C::kM);
    walk.gap = grid.gaps[slot];
    reload_shared();
    if (grid.tickets) {  // The gap shrinks to whole tickets, because tiles_before() counts by tickets.
      const int32_t tiles = 1 << grid.ticket_shift;
      walk.gap = {(walk.gap.lo + tiles - 1) & -tiles, walk.gap.hi & -tiles};
    }
    reload_shared();
    score.blocks =
        grid.blocks + first_slot_of(p, work.leading, tile.index, tile.q_begin, p.q_rows, kRowBlock);
  }
  // part(): the head of dkey and dvalue.
  template <class Part>
  __device__ __forceinline__ void find_rows(const Problem& p, Part part) {
    reload_shared();
    lse = p.lse.as<const float>() + offset(p.lse, work.head, work.tile.q_begin);
    reload_shared();
    delta = p.delta.as<const float>() + offset(p.delta, work.head, work.tile.q_begin);
    reload_shared();
    dkey = {p.dkey.as<T>() + offset(p.dkey, part(), work.tile.k_begin), p.dkey.row, p.head_dim};
    reload_shared();
    dvalue = {p.dvalue.as<T>() + offset(p.dvalue, part(), work.tile.k_begin), p.dvalue.row, p.value_dim};
  }
  // There is at most one leading dimension.
  __device__ __forceinline__ int64_t offset(const View& view, int32_t head, int32_t row) const {
    return work.leading * view.leading[0] + view.offset(work.batch_row, head, row);
  }
};

}  // namespace jax_flash
