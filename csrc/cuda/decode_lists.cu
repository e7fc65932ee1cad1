// Makes the lists of core/visible/listed_tiles.h. Decode divides the listed tiles among its CTAs, and reads
// no others.
#include <algorithm>

#include "cuda/decode/latent_call.cuh"
#include "cuda/launch.h"
#include "cuda/ptx/dependent.cuh"

namespace jax_flash::decode {
namespace {

constexpr int kMostThreads = 1024;

// How much a row of blocks shows of the columns [lo, hi).
__device__ SeenPiece seen_in_row(const uint8_t* row, const Interval& columns) {
  bool any = false, all = true;
  for (int32_t at = columns.lo; at < columns.hi && !(any && !all);) {
    const uint8_t* const from = row + at;
    if (at + 4 <= columns.hi && reinterpret_cast<uintptr_t>(from) % 4 == 0) {
      const uint32_t four = *reinterpret_cast<const uint32_t*>(from);
      const uint32_t zeros = (four - 0x01010101u) & ~four & 0x80808080u;  // 0 if no byte is 0
      any |= four != 0, all &= zeros == 0, at += 4;
    } else {
      any |= *from != 0, all &= *from != 0, at += 1;
    }
  }
  return seen_piece_of(any, all);
}

// What the blocks of a sequence show the rows of a column.
struct BlocksOfRows {
  const DecodeCall& call;
  const ColumnRows& rows;
  const SequenceWork& work;
  BlockMask blocks;

  // Calls look(a row of blocks) for those of all rows in use, until it returns true. Rows of a head that
  // follow each other often share one, which is looked at once. Returns whether all rows have one.
  template <class Look>
  __device__ bool find(Look look) const {
    const int32_t group = rows.group.value, heads = blocks.head == 0 ? 1 : min(group, rows.count());
    bool all = true;
    for (int32_t first = 0; first < heads; ++first) {
      int32_t before = -1;
      for (int32_t row = first; row < rows.count();) {
        const int32_t position = rows.position(row);
        if (position >= work.band.q_len) break;  // the other rows are padding
        const int32_t at = call.block_rows.quotient(position + blocks.first_row);
        if (at >= blocks.rows) {
          all = false;
          break;
        }
        if (at != before && look(blocks.seen + rows.head(row) * blocks.head + at * blocks.row)) return all;
        before = at;
        row = blocks.head == 0 ? (position + 1) * group - rows.first : row + group;
      }
    }
    return all;
  }
  // How much of `keys`, which is not empty, the rows see.
  __device__ SeenPiece seen(const Interval& keys) const {
    const Interval columns{call.block_keys.quotient(keys.lo + blocks.first_key),
                           call.block_keys.quotient(keys.hi - 1 + blocks.first_key) + 1},
        stored = intersect(columns, {0, blocks.columns});
    bool any = false, all = stored.size() == columns.size();
    const bool have_blocks = find([&](const uint8_t* own) {
      const SeenPiece seen = seen_in_row(own, stored);
      any |= seen != SeenPiece::kNone, all &= seen == SeenPiece::kAll;
      return any && !all;
    });
    return seen_piece_of(any, all && have_blocks);
  }
  // Whether some row sees a key by its blocks.
  __device__ bool any_sees(int32_t key) const {
    const int32_t column = call.block_keys.quotient(key + blocks.first_key);
    bool sees = false;
    if (column < blocks.columns) find([&](const uint8_t* own) { return sees = own[column] != 0; });
    return sees;
  }
};

// How the threads of a list look at its tiles: each at `keys` keys, which lie in one block if blocks are that
// large, else at a piece.
struct Looks {
  int32_t of_tile = 1, keys;

  JF_HD Looks(const DecodeCall& call, int32_t tile) : keys(tile) {
    const bool moved = call.position.data != nullptr;
    for (; of_tile < kPiecesOfTile && (moved || call.block_keys.value % keys != 0); of_tile *= 2) keys /= 2;
  }
};

// One CTA makes the list with number `list`, of the keys in work.keys outside work.gap. tile: keys of a tile.
__device__ void make_list(const DecodeCall& call, const ColumnRows& rows, const SequenceWork& work,
                          int32_t list, int32_t tile) {
  constexpr int kMostWarps = kMostThreads / 32;
  __shared__ uint32_t seen_in_warp[kMostWarps];  // a bit for the first lane of each tile that is seen
  __shared__ Interval keys_in_warp[kMostWarps];
  const auto thread = static_cast<int32_t>(threadIdx.x), warp = thread / 32, lane = thread % 32,
             warps = static_cast<int32_t>(blockDim.x / 32);
  const Looks looks(call, tile);
  const int32_t tiles_of_warp = 32 / looks.of_tile;
  const BlocksOfRows blocks{call, rows, work, block_mask_of(call, work)};
  const Interval tiles = tiles_of(work.keys, tile);
  uint32_t* const to = call.lists.tiles + int64_t{list} * call.lists.most;
  int32_t count = 0;
  Interval seen_keys{INT32_MAX, 0};  // in whole pieces, by this warp
  for (int32_t first = tiles.lo; first < tiles.hi; first += tiles_of_warp * warps) {
    const int32_t first_of_warp = first + tiles_of_warp * warp, number = first_of_warp + lane / looks.of_tile;
    SeenPiece seen = SeenPiece::kNone;
    if (number < tiles.hi) {
      const int32_t begin = number * tile + lane % looks.of_tile * looks.keys;
      const Interval keys{max(begin, work.keys.lo), min(looks.keys, work.keys.hi - begin) + begin};
      const bool in_gap = work.gap.lo <= keys.lo && keys.hi <= work.gap.hi;
      if (!keys.empty() && !in_gap) seen = blocks.seen(keys);
    }
    // Bit i of each belongs to lane i.
    const uint32_t any = __ballot_sync(~0u, seen != SeenPiece::kNone),
                   some = __ballot_sync(~0u, seen == SeenPiece::kSome);
    if (any) {
      const int32_t begin = first_of_warp * tile;
      seen_keys.lo = min(seen_keys.lo, begin + (__ffs(static_cast<int>(any)) - 1) * looks.keys);
      seen_keys.hi = begin + (32 - __clz(static_cast<int>(any))) * looks.keys;
    }
    const uint32_t own = (1u << looks.of_tile) - 1;
    const uint32_t listed = __ballot_sync(~0u, lane % looks.of_tile == 0 && (any >> lane & own) != 0);
    if (lane == 0) seen_in_warp[warp] = listed;
    __syncthreads();
    int32_t at = count + __popc(listed & ((1u << lane) - 1));
    for (int32_t i = 0; i < warps; ++i) {
      if (i < warp) at += __popc(seen_in_warp[i]);
      count += __popc(seen_in_warp[i]);
    }
    if (listed >> lane & 1) {
      ListedTile found{number};
      for (int i = 0; i < kPiecesOfTile; ++i) {
        const int look = lane + i * looks.of_tile / kPiecesOfTile;
        const SeenPiece of = seen_piece_of(any >> look & 1, !(some >> look & 1));
        found.pieces |= static_cast<uint32_t>(of) << i * kPieceBits;
      }
      to[at] = found.packed();
    }
    __syncthreads();  // before `seen_in_warp` is written again
  }
  if (lane == 0) keys_in_warp[warp] = seen_keys;
  __syncthreads();
  if (warp > 0) return;
  for (int32_t i = 1; i < warps; ++i)
    seen_keys = {min(seen_keys.lo, keys_in_warp[i].lo), max(seen_keys.hi, keys_in_warp[i].hi)};
  seen_keys = intersect(seen_keys, work.keys);
  // Of a piece, which may be seen in part, each lane looks at a key.
  if (count > 0 && looks.of_tile == kPiecesOfTile) {
    const int32_t low = seen_keys.lo + lane, high = seen_keys.hi - 1 - lane;
    const uint32_t from = __ballot_sync(~0u, low < seen_keys.hi && blocks.any_sees(low)),
                   to_end = __ballot_sync(~0u, high >= seen_keys.lo && blocks.any_sees(high));
    if (from) seen_keys.lo += __ffs(static_cast<int>(from)) - 1;
    if (to_end) seen_keys.hi -= __ffs(static_cast<int>(to_end)) - 1;
  }
  if (lane == 0)
    call.lists.counts[list] = count, call.lists.keys[list] = count > 0 ? seen_keys : Interval{0, 0};
}

// The column and the sequence of the list that a CTA makes.
__device__ Interval column_and_sequence(const DecodeLists& lists) {
  const auto list = static_cast<int32_t>(blockIdx.x), column = list / lists.sequences;
  return {column, list - column * lists.sequences};
}

__global__ void __launch_bounds__(kMostThreads)
    list_tiles(const __grid_constant__ DecodeCall call, int32_t block_rows, int32_t tile) {
  ptx::let_next_kernel_start();
  if (call.starts && !are_in_order(call)) return;
  const auto [column, number] = column_and_sequence(call.lists);
  const ColumnRows rows = ColumnRows::of_column(call, column, block_rows);
  SequenceWork work = rows.sequence(call, number);
  skip_hidden_keys(call, rows, work);
  make_list(call, rows, work, static_cast<int32_t>(blockIdx.x), tile);
}

template <int kRows>
__global__ void __launch_bounds__(kMostThreads)
    list_latent_tiles(const __grid_constant__ LatentCall call, int32_t tile) {
  ptx::let_next_kernel_start();
  const auto [kv_head, number] = column_and_sequence(call.lists);
  const LatentColumn<kRows, false> column{call, kv_head};
  SequenceWork work = column.sequence(call, number);
  const ColumnRows rows = column.rows(column.entry(number));
  if (work.served()) skip_hidden_keys(call, rows, work);
  make_list(call, rows, work, static_cast<int32_t>(blockIdx.x), tile);
}

// Launches a CTA for each list, with a thread for each look if these are not too many.
template <class Call, class... Arguments>
cudaError_t launch_lists(void (*kernel)(Call, Arguments...), const Call& call, int32_t tile,
                         cudaStream_t stream, Arguments... arguments) {
  if (!call.lists) return cudaSuccess;
  const int64_t looks = int64_t{call.lists.most} * Looks(call, tile).of_tile;
  const auto threads = std::clamp<int64_t>(ceil_div(looks, 32) * 32, 32, kMostThreads);
  return launch(kernel, int64_t{call.lists.columns} * call.lists.sequences, static_cast<int32_t>(threads), 0,
                stream, call, arguments...);
}

}  // namespace

cudaError_t launch_decode_lists(const DecodeCall& call, int32_t block_rows, int32_t tile,
                                cudaStream_t stream) {
  return launch_lists(list_tiles, call, tile, stream, block_rows, tile);
}

cudaError_t launch_latent_lists(const LatentCall& call, int32_t rows, int32_t tile, cudaStream_t stream) {
  return launch_lists(rows == 16 ? list_latent_tiles<16> : list_latent_tiles<64>, call, tile, stream, tile);
}

}  // namespace jax_flash::decode
