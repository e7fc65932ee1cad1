// The launch of a call: the result of plan(), which the launch functions take; kernels take parts of it.
#pragma once

#include <cstdint>

#include "core/band.h"
#include "core/plan/row.h"
#include "core/visible/mask_tiles.h"

namespace jax_flash {

// The tiles of query rows or of key rows that a kernel's grid covers.
struct TileGrid {
  int32_t block = 0;           // rows of a tile
  bool segment_parts = false;  // segments give an interval to each kSegmentPart rows, too
  int64_t tiles = 0;           // tiles of one head of one leading entry (fixed layouts: of one batch entry)
  int64_t blocks = 0;          // CTAs if each takes one tile
  int64_t schedule = -1;       // offset of the varlen schedule in the workspace; -1: blockIdx gives the tile
  int64_t segments = -1;       // offset of the interval that segments leave to each tile; -1: no segments
  int64_t ranges = -1;         // offset of the table of cuda/ranges.cu: the keys that tiles see; -1: none
  int64_t lists = -1;          // offset of the lists of cuda/blocks.cu; -1: none
  int64_t mask_tiles = -1;     // offset of the tiles of a boolean mask (cuda/mask_tiles.cu); -1: none
  int64_t mask_words = -1;     // offset of their elements as bits; -1: none
  int32_t other_block = 0;     // with ranges or lists: rows of a tile of the other side
  int32_t consumers = 2;       // with lists of key tiles: consumer warpgroups of a query tile
};

// How decode splits the keys. A column is a KV head, or one chunk of its query rows if they are too many for
// a tile. The CTAs of a column divide the key tiles of all sequences into equal ranges, or into splits of a
// given size.
struct DecodeGrid {
  int32_t columns = 0;      // neighbouring CTAs take neighbouring columns
  int32_t ranges = 0;       // CTAs of a column, or of a cluster if all run in clusters
  int32_t parts = 0;        // splits of every sequence; 0: the ranges' limits split them
  int32_t part_tiles = 0;   // or key tiles of every split; 0: not fixed
  int32_t slots = 0;        // most splits of one sequence, if parts or part_tiles is set
  int32_t packed_rows = 0;  // the forward runs packed sequences with more query rows per KV head
  int64_t all_slots = 0;    // partial results of a column
  int64_t memory = -1;      // their offset in the workspace; -1: no sequence is split
  int64_t lists = -1;       // offset of the lists of cuda/decode_lists.cu; -1: no block mask and no mask

  JF_HD bool fixed_parts() const { return parts > 0 || part_tiles > 0; }
  // Whether decode runs a packed sequence.
  JF_HD bool takes(int64_t q_len, int64_t group) const {
    return packed_rows > 0 && q_len * group <= packed_rows;
  }
};

// What rounds dQ of the backward.
enum class DqRounding : uint8_t {
  kKernel,    // another kernel, after all key tiles have added to the sums
  kClusters,  // clusters of all key tiles of a KV head, which also clear its sums
  kCtas,      // CTAs whose key tile has all keys, so that they need no sums
  kHeads,     // CTAs that go through all key tiles of a KV head and keep its sums
};

// A call with packed sequences may run two kernels, decode and then the forward. One plan serves both:
// `decode` and `decode_kernel` belong to decode, `score` and `shared` to the forward.
//
// The forward runs over query tiles. The backward runs over key tiles and adds dQ to float32 sums or,
// where dQ has to be repeatable, a second kernel over query tiles computes dQ; or its CTAs store dQ. The bias
// gradient runs over the tiles of dbias, whose CTAs are counted in `queries`.
struct LaunchPlan {
  int32_t kernel = -1;         // index into the built rows; -1: none runs
  int32_t decode_kernel = -1;  // with packed sequences: runs first, for sequences with few rows; -1: none
  ScoreKind score = ScoreKind::kPlain;
  TileGrid queries, keys;
  DecodeGrid decode;
  // CTAs per cluster. In the forward the two CTAs share multicast K and V, and each has one of two adjacent
  // query tiles. In the backward they share multicast Q and dO, and each has half of a key tile, unless they
  // round dQ. With Design::kClusterColumns they work on the same tile, and each has half of a head's
  // columns.
  int32_t cluster_size = 1;
  int32_t persistent_ctas = 0;  // CTAs among which the tiles are distributed; 0: one CTA per tile
  int64_t tile_counter = -1;    // offset of the tile counter (4 bytes, cleared before the kernel runs) in the
                                // workspace; -1: CTA i takes tiles i, i + CTAs, …
  int64_t dq_sums = -1;         // offset of dQ in float32; -1: none
  int64_t dq_tickets = -1;      // offset of the tickets that order the additions to dQ; -1: no order
  DqRounding dq_rounding = DqRounding::kKernel;  // what rounds the sums of dQ
  int64_t shared = 0;                            // bytes of shared memory per CTA
  int64_t workspace = 0;                         // bytes of the workspace that are used
  // The parts of the work on one tile, by different CTAs: in the backward parts of the query heads of a KV
  // head, in the bias gradient parts of the batch. Their results are float32, and another kernel adds them.
  int32_t parts = 1;
  int64_t part_sums = -1;  // offset of these results in the workspace; -1: none

  bool general() const { return score != ScoreKind::kPlain; }
};

inline constexpr int32_t kNoSequence = -1;
// The most packed sequences that the schedule sorts. Their slots come first; those after an empty one are
// empty, too.
inline constexpr int32_t kMostSorted = 510;

// One tile of query or key rows of one sequence: an entry of the varlen schedule, which the device builds
// from cu_seqlens. Rows [row, end) of the tile are written; those from q_len or k_len on are padding.
struct TileWork {
  int32_t index;  // the sequence; kNoSequence: tokens outside every sequence, or an empty entry
  int32_t q_begin, k_begin;
  int32_t q_len, k_len;
  int32_t row, end;
  int32_t tiles;  // tiles of the sequence; 0: nothing to do

  JF_HD int32_t used_queries() const { return end < q_len ? end : q_len; }
  JF_HD int32_t used_keys() const { return end < k_len ? end : k_len; }
};
static_assert(sizeof(TileWork) == 32);

// The tiles of a grid, as a kernel parameter.
struct GridTiles {
  const TileWork* schedule;  // of packed sequences, else null
  const Interval* segments;  // visible rows or keys of each tile of a batch entry; null without segments
  int32_t count;             // tiles of one head
  MaskTiles mask;            // the tiles of a boolean mask, if the plan classifies them
};

// Whether ranges or a boolean mask may leave a gap in the interval that a tile sees.
inline bool leaves_gaps(const AttentionSpec& spec) {
  return spec.has(Operand::kRanges) || spec.has(Operand::kMask);
}
JF_HD bool leaves_gaps(const Problem& p) { return p.ranges || p.mask; }

// The number of intervals per slot in the table of segments: one, and where there may be gaps also its gap
// (SeenByTile).
inline int64_t intervals_of_slot(const AttentionSpec& spec) { return leaves_gaps(spec) ? 2 : 1; }

// For each query tile of a batch entry: the keys that segments let it see, and whether these keys and its
// rows belong to one segment. Null without segments.
struct TileSegments {
  const Interval* keys = nullptr;
  const int32_t* one_segment = nullptr;
  const Interval* part_keys = nullptr;  // for parts of kSegmentPart rows; null if the plan has none
  const SeenByBlock* blocks = nullptr;  // in kernels for ranges: the keys that blocks and tiles of rows see
  const SeenByTile* tiles = nullptr;
  KeyLists lists{};   // in kernels that go through lists: the key tiles of query tiles
  MaskWords words{};  // the elements of a boolean mask
};

inline constexpr int64_t kWorkspaceAlignment = 256;  // bytes; alignment of each part of the workspace
inline constexpr int32_t kSegmentPart = kRowBlock;   // rows of a consumer warpgroup
inline constexpr int64_t kSmallestTile =
    16;  // fewest rows in csrc/kernels.def, which bound the number of tiles
inline constexpr int64_t kLargestQueryTile = 128;  // most query rows of the backward there

}  // namespace jax_flash
