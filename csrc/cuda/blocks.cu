// Builds the lists of core/visible/key_tiles.h, of the tiles in which a block mask or a boolean mask leaves
// some key visible.
#include <algorithm>
#include <type_traits>

#include "core/sequence.h"
#include "core/visible/key_tiles.h"
#include "core/visible/mask_tiles.h"
#include "cuda/launch.h"
#include "cuda/ptx/dependent.cuh"
#include "cuda/registry.h"
#include "cuda/warp.cuh"
#include "cuda/work.cuh"

namespace jax_flash {
namespace {

constexpr int kConsumersOfTile = 2;  // of a key tile
constexpr int kMostConsumers = 3;    // of a query tile

// The source of a call's mask. at() returns the mask of the heads from `head` on: the operand `block_mask`,
// or the tiles of a boolean mask.
struct OperandBlocks {
  __device__ BlockMask at(const Problem& p, int64_t leading, const Sequence& s, int32_t head) const {
    return block_mask_of(p, leading, s, head);
  }
};
struct MaskTileBlocks {
  MaskTiles tiles;
  __device__ MaskTiles at(const Problem&, int64_t leading, const Sequence& s, int32_t head) const {
    return tiles.at(leading, s.index, head);
  }
};

// How much of `keys`, which lie in one block, the rows of head h see. `keys` is not empty.
template <class Mask>
__device__ SeenPiece seen_piece(const Band& band, const Mask& blocks, int32_t h, const Interval& rows,
                                const Interval& keys) {
  if (rows.empty() || intersect(band.rows(rows.lo, rows.hi), keys).empty()) return SeenPiece::kNone;
  const SeenPiece seen = blocks.seen_of(h, rows, keys);
  if (seen != SeenPiece::kAll) return seen;
  const Interval whole = band.common(rows.lo, rows.hi);
  return whole.lo <= keys.lo && keys.hi <= whole.hi ? SeenPiece::kAll : SeenPiece::kSome;
}

constexpr int kListWarps = 4;  // most warps that make a list of key tiles

// One CTA makes the list of one query tile; each of its threads looks at a piece of the keys at a time.
// `keys`: the number of keys in a key tile; `counter`: null, or the counter of tiles that the first CTA
// clears.
template <class Source>
__global__ void __launch_bounds__(32 * kListWarps)
    list_key_tiles(const __grid_constant__ Problem p, const __grid_constant__ Source source,
                   const __grid_constant__ KeyLists to, int32_t keys, uint32_t* counter) {
  ptx::let_next_kernel_start();
  ptx::wait_for_kernel_before();                 // it classifies the tiles of a boolean mask
  __shared__ uint32_t seen_in_warp[kListWarps];  // a bit for each lane
  const auto thread = static_cast<int32_t>(threadIdx.x), warps = static_cast<int32_t>(blockDim.x / 32);
  clear_counter(counter);
  // Unsigned 32-bit divisions are the shortest.
  const uint32_t list = blockIdx.x, tiles = to.query_tiles, listed = to.listed, entry = list / tiles / listed,
                 number = list / tiles % listed, kv_head = number / static_cast<uint32_t>(to.of_group);
  const auto slot = static_cast<int32_t>(number - kv_head * to.of_group);
  const int32_t row = static_cast<int32_t>(list % tiles) * to.rows;
  const uint32_t batches = p.batch, leading = entry / batches;
  const Sequence s = fixed_sequence(p, leading, static_cast<int32_t>(entry % batches));
  const Band band = make_band(p, leading, s);
  const auto blocks = source.at(p, leading, s, static_cast<int32_t>(kv_head) * to.group);
  const int32_t end = min(row + to.rows, s.q_len);
  const Interval seen = band.rows(row, end);
  const int32_t pieces = keys / to.keys;  // pieces per tile
  KeyPieces* const own = to.tiles + int64_t{list} * to.most;
  int32_t count = 0, last = 0;  // pieces so far; the first key of the last piece
  for (int32_t first = seen.lo / to.keys * to.keys; first < seen.hi; first += 32 * warps * to.keys) {
    const int32_t key = first + thread * to.keys;
    SeenPiece seen_by[kMostConsumers] = {SeenPiece::kNone, SeenPiece::kNone, SeenPiece::kNone};
    bool is_seen = false;
    for (int i = 0; key < seen.hi && i < to.consumers; ++i) {
      const KeyLists::Part part = to.part(slot, i);
      const int32_t begin = row + part.row;
      if (part.head >= to.group) break;
      seen_by[i] =
          seen_piece(band, blocks, part.head, {begin, min(begin + kRowBlock, end)}, {key, key + to.keys});
      is_seen |= seen_by[i] != SeenPiece::kNone;
    }
    if (to.consumers == 2) seen_by[2] = SeenPiece::kAll;
    const uint32_t seen_here = __ballot_sync(~0u, is_seen);
    if (thread % 32 == 0) seen_in_warp[thread / 32] = seen_here;
    __syncthreads();
    int32_t at = count + __popc(seen_here & ((1u << thread % 32) - 1));
    for (int32_t warp = 0; warp < warps; ++warp) {
      const uint32_t bits = seen_in_warp[warp];
      if (warp < thread / 32) at += __popc(bits);
      count += __popc(bits);
      if (bits) last = first + (32 * warp + 31 - __clz(static_cast<int>(bits))) * to.keys;
    }
    if (is_seen) {
      own[at / pieces].piece[at % pieces] = KeyPieces::make(key, seen_by[0], seen_by[1], seen_by[2]);
      for (int32_t i = pieces; at % pieces == 0 && i < kMostPieces; ++i) own[at / pieces].piece[i] = 0;
    }
    __syncthreads();  // before `seen_in_warp` is written again
  }
  if (thread > 0) return;
  const int32_t of_last = count - count / pieces * pieces;
  for (int32_t i = of_last; of_last > 0 && i < pieces; ++i)
    own[count / pieces].piece[i] = KeyPieces::make(kNoKeys, SeenPiece::kNone, SeenPiece::kNone,
                                                   to.consumers == 2 ? SeenPiece::kAll : SeenPiece::kNone);
  // Rows of V in [k_len, k_rows) may hold NaN. TMA loads zeros past k_rows, and for pieces without keys.
  const bool cut = last + to.keys > s.k_len && s.k_len < p.k_rows;
  const int32_t before_last = (of_last > 0 ? of_last - 1 : pieces - 1) * to.keys;
  to.lists[list] = {(count + pieces - 1) / pieces, cut ? before_last + s.k_len - last : keys};
}

// How much of `keys`, which may lie in several blocks, the rows of head h see. `keys` is not empty.
template <class Mask>
__device__ SeenPiece seen_keys(const Band& band, const Mask& blocks, int32_t h, const Interval& rows,
                               const Interval& keys) {
  bool any = false, all = true;
  for (int32_t key = keys.lo; key < keys.hi; key = (key / blocks.block_keys + 1) * blocks.block_keys) {
    const int32_t end = min((key / blocks.block_keys + 1) * blocks.block_keys, keys.hi);
    const SeenPiece seen = seen_piece(band, blocks, h, rows, {key, end});
    any |= seen != SeenPiece::kNone, all &= seen == SeenPiece::kAll;
  }
  return all ? SeenPiece::kAll : any ? SeenPiece::kSome : SeenPiece::kNone;
}

constexpr int kStepWarps = 8, kKeptSteps = 2048;
enum StepKind { kOfFirst, kOfSecond, kOfBoth, kStepKinds };  // the consumers some of whose keys are seen

// The index in the list of the i-th step of a kind. `steps`: the number of steps of each kind. Steps with
// work for both consumers come first. Then steps for the first and for the second alternate, so that neither
// idles.
__device__ int32_t place_of(StepKind kind, int32_t i, const int32_t (&steps)[kStepKinds]) {
  const int32_t pairs = min(steps[kOfFirst], steps[kOfSecond]);
  if (kind == kOfBoth) return i;
  return steps[kOfBoth] + (i < pairs ? 2 * i + (kind == kOfSecond) : pairs + i);
}

// The steps that a key tile may have: query tiles of `rows` rows, of each head of a KV head. The tile begins
// at `key` and has 64 keys for each of `parts` consumers.
template <class Mask>
struct PossibleSteps {
  const Band& band;
  const Mask& blocks;
  Interval tiles;  // of queries, by the band
  int32_t rows, key, parts;

  // The i-th of them as a list element.
  __device__ int32_t at(int32_t i) const {
    const int32_t h = i / tiles.size(), tile = tiles.lo + i % tiles.size();
    SeenPiece seen_by[kConsumersOfTile] = {SeenPiece::kNone, SeenPiece::kNone};
    for (int part = 0; part < parts; ++part) {
      const int32_t begin = key + part * kRowBlock;
      if (begin < band.k_len)
        seen_by[part] = seen_keys(band, blocks, h, {tile * rows, min((tile + 1) * rows, band.q_len)},
                                  {begin, begin + kRowBlock});
    }
    return ListedStep::make(h, tile, seen_by[0], seen_by[1]);
  }
};

// One CTA makes the list of one key tile. `tiles`: key tiles of a head; `rows`: rows of a query tile;
// `parts`: consumers of a key tile.
template <class Source>
__global__ void __launch_bounds__(32 * kStepWarps)
    list_steps(const __grid_constant__ Problem p, const __grid_constant__ Source source,
               const __grid_constant__ StepLists to, uint32_t tiles, int32_t rows, int32_t parts) {
  __shared__ int32_t of_warp[kStepKinds][kStepWarps], kept[kKeptSteps];
  const auto thread = static_cast<int32_t>(threadIdx.x), warp = thread / 32,
             threads = static_cast<int32_t>(blockDim.x);
  const uint32_t list = blockIdx.x, kv_heads = p.kv_heads, batches = p.batch, head_slot = list / tiles,
                 entry = head_slot / kv_heads, leading = entry / batches;
  const int32_t key = static_cast<int32_t>(list % tiles) * parts * kRowBlock;
  const int32_t heads = p.heads / p.kv_heads, head = static_cast<int32_t>(head_slot % kv_heads) * heads;
  const Sequence s = fixed_sequence(p, leading, static_cast<int32_t>(entry % batches));
  const Band band = make_band(p, leading, s);
  const auto blocks = source.at(p, leading, s, head);
  const Interval seen = tiles_of(band.queries(key, key + parts * kRowBlock), rows);
  const PossibleSteps<std::remove_cv_t<decltype(blocks)>> possible{band, blocks, seen, rows, key, parts};
  const int32_t unseen = ListedStep::make(0, 0, SeenPiece::kNone, SeenPiece::kNone);
  int32_t* const own = to.steps + int64_t{list} * to.most;
  int32_t steps[kStepKinds] = {0, 0, 0};
  Interval seeing{INT32_MAX, 0};  // query tiles from the first to the last that sees a key
  // The first pass counts the steps of each kind, and keeps what it has found. All steps of a single consumer
  // are of one kind.
  for (const bool stores : {false, true}) {
    if (parts == 1 && !stores) continue;
    int32_t before[kStepKinds] = {0, 0, 0};
    for (int32_t first = 0; first < heads * seen.size(); first += threads) {
      const int32_t i = first + thread;
      int32_t step = unseen;
      if (i < heads * seen.size()) {
        step = parts > 1 && stores && i < kKeptSteps ? kept[i] : possible.at(i);
        if (i < kKeptSteps) kept[i] = step;
      }
      const bool is_seen[] = {KeyPieces::seen(step, 0) != SeenPiece::kNone,
                              KeyPieces::seen(step, 1) != SeenPiece::kNone};
      uint32_t same[kStepKinds];  // the lanes whose step has the same kind
      for (int kind = 0; kind < kStepKinds; ++kind) {
        same[kind] =
            __ballot_sync(~0u, is_seen[0] == (kind != kOfSecond) && is_seen[1] == (kind != kOfFirst));
        if (thread % 32 == 0) of_warp[kind][warp] = __popc(same[kind]);
      }
      __syncthreads();
      if (is_seen[0] || is_seen[1]) {
        const int32_t tile = ListedStep::tile(step);
        seeing = {min(seeing.lo, tile), max(seeing.hi, tile + 1)};
      }
      for (int kind = 0; kind < kStepKinds; ++kind) {
        int32_t at = before[kind] + __popc(same[kind] & ((1u << thread % 32) - 1));
        for (int j = 0; j < threads / 32; ++j) {
          if (j < warp) at += of_warp[kind][j];
          before[kind] += of_warp[kind][j];
        }
        if (stores && same[kind] >> thread % 32 & 1)
          own[place_of(static_cast<StepKind>(kind), at, steps)] = step;
      }
      __syncthreads();
    }
    for (int kind = 0; kind < kStepKinds; ++kind) steps[kind] = before[kind];
  }
  for (int apart = 1; apart < 32; apart *= 2)
    seeing = {min(seeing.lo, __shfl_xor_sync(~0u, seeing.lo, apart)),
              max(seeing.hi, __shfl_xor_sync(~0u, seeing.hi, apart))};
  if (thread % 32 == 0) of_warp[0][warp] = seeing.lo, of_warp[1][warp] = seeing.hi;
  __syncthreads();
  if (thread > 0) return;
  for (int j = 0; j < threads / 32; ++j)
    seeing = {min(seeing.lo, of_warp[0][j]), max(seeing.hi, of_warp[1][j])};
  to.counts[list] = steps[kOfFirst] + steps[kOfSecond] + steps[kOfBoth];
  to.spans[list] = heads * seeing.size();
}

constexpr int kLengths = 256;  // classes of lists by their lengths

// Orders the key tiles of a group of heads, whose numbers follow each other (find_work). If lists have at
// least half of the query tiles in their spans, as where documents hide the rest, neighbouring key tiles
// share query tiles, and the order stays as it is, so that L2 serves them. Otherwise the longest lists come
// first and the last CTAs to run have short ones. `heads`: of all groups; `together`: of a group.
__global__ void __launch_bounds__(kLengths)
    order_tiles(const __grid_constant__ StepLists lists, uint32_t tiles, uint32_t heads, uint32_t together) {
  __shared__ uint32_t end[kLengths];           // of each class, and later the place of its next tile
  __shared__ float of_warp[2][kLengths / 32];  // steps and spans
  const uint32_t thread = threadIdx.x, head = blockIdx.x * together, own = min(together, heads - head),
                 first = head * tiles;
  const auto class_of = [&](uint32_t i) {
    const int64_t length = lists.counts[(head + i % own) * tiles + i / own];
    return kLengths - 1 - static_cast<uint32_t>(length * (kLengths - 1) / lists.most);
  };
  end[thread] = 0;
  float steps = 0, spans = 0;
  for (uint32_t i = thread; i < own * tiles; i += kLengths) {
    steps += static_cast<float>(lists.counts[first + i]);
    spans += static_cast<float>(lists.spans[first + i]);
  }
  steps = warp_sum(steps), spans = warp_sum(spans);
  if (thread % 32 == 0) of_warp[0][thread / 32] = steps, of_warp[1][thread / 32] = spans;
  __syncthreads();
  steps = spans = 0;
  for (int warp = 0; warp < kLengths / 32; ++warp) steps += of_warp[0][warp], spans += of_warp[1][warp];
  if (2 * steps >= spans) {
    for (uint32_t i = thread; i < own * tiles; i += kLengths)
      lists.order[first + i] = static_cast<int32_t>(first + i);
    return;
  }
  for (uint32_t i = thread; i < own * tiles; i += kLengths) atomicAdd(&end[class_of(i)], 1u);
  __syncthreads();
  const uint32_t size = end[thread];
  for (uint32_t apart = 1; apart < kLengths; apart *= 2) {
    const uint32_t before = thread >= apart ? end[thread - apart] : 0;
    __syncthreads();
    end[thread] += before;
    __syncthreads();
  }
  end[thread] -= size;
  __syncthreads();
  for (uint32_t i = thread; i < own * tiles; i += kLengths)
    lists.order[first + atomicAdd(&end[class_of(i)], 1u)] = static_cast<int32_t>(first + i);
}

// Launches the kernel that makes the plan's lists, if it has any.
template <class Source>
cudaError_t launch_lists(const Problem& p, const Source& source, const LaunchPlan& plan, void* workspace,
                         cudaStream_t stream) {
  if (plan.keys.lists >= 0) {
    const int64_t lists = p.leading.count() * p.batch * p.kv_heads * plan.keys.tiles;
    const StepLists to = step_lists(p, plan.keys, workspace);
    const auto warps = std::clamp<int64_t>(ceil_div(to.most, 32), 1, kStepWarps);
    return launch(list_steps<Source>, lists, static_cast<int32_t>(32 * warps), 0, stream, p, source, to,
                  static_cast<uint32_t>(plan.keys.tiles), plan.keys.other_block, plan.keys.block / kRowBlock);
  }
  if (plan.queries.lists < 0) return cudaSuccess;
  const KeyLists lists = key_lists(p, plan.queries, workspace);
  const auto warps = std::clamp<int64_t>(ceil_div(p.k_rows, 32 * lists.keys), 1, kListWarps);
  const bool early = std::is_same_v<Source, MaskTileBlocks>;
  return launch_early(early, list_key_tiles<Source>, 1,
                      p.leading.count() * p.batch * lists.listed * plan.queries.tiles,
                      static_cast<int32_t>(32 * warps), 0, stream, p, source, lists, plan.queries.other_block,
                      tile_counter(plan, workspace));
}

}  // namespace

cudaError_t launch_step_order(const StepLists& lists, int32_t tiles_per_head, uint32_t heads,
                              uint32_t together, cudaStream_t stream) {
  return launch(order_tiles, ceil_div(heads, together), kLengths, 0, stream, lists,
                static_cast<uint32_t>(tiles_per_head), heads, together);
}

cudaError_t launch_blocks(const Problem& p, const LaunchPlan& plan, void* workspace, cudaStream_t stream) {
  if (p.batch == 0) return cudaSuccess;
  const TileGrid& grid = plan.keys.mask_tiles >= 0 ? plan.keys : plan.queries;
  if (grid.mask_tiles < 0) return launch_lists(p, OperandBlocks{}, plan, workspace, stream);
  const MaskTiles tiles = mask_tiles(p, grid, workspace);
  const MaskWords words = mask_words(p, grid, workspace);
  if (cudaError_t e = launch_mask_tiles(p, tiles, words, stream); e != cudaSuccess) return e;
  return launch_lists(p, MaskTileBlocks{tiles}, plan, workspace, stream);
}

}  // namespace jax_flash
