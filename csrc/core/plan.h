// Which kernel runs a call, and how: a pure function of spec, shapes and device.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "problem.h"

namespace jax_flash {

// A row of csrc/kernels.def. `dtypes` is a bit set of DType; a built kernel has one bit.
struct KernelRow {
  const char* family;  // "sm80"
  int32_t capability;  // 80: the oldest device of the family
  Pass pass;
  uint32_t dtypes;
  int32_t head_dim, value_dim;
  int32_t block_m, block_n;
  int32_t stages, warps;
  int32_t blocks;  // per multiprocessor, that the registers must allow; of the sm90 family: teams in a block

  int32_t teams() const { return capability == 90 ? blocks : 1; }
  bool takes(DType dtype) const { return dtypes >> static_cast<int32_t>(dtype) & 1; }
  std::string to_string() const;
};

struct Device {
  int32_t capability;  // 90 for 9.0
  int32_t sm_count;
  int32_t shared_memory;      // bytes one block may use
  bool always_pairs = false;  // for tests: LaunchPlan::pairs wherever there is such a kernel
};

// The sizes that a plan depends on: those of a Problem.
struct Shapes {
  DType dtype;
  DType kv_dtype;   // dtype, or float8
  int64_t leading;  // product of the leading dimensions
  int32_t leading_rank;
  int64_t batch;  // batch entries, or sequences
  int64_t heads, kv_heads, head_dim, value_dim;
  int64_t q_rows, k_rows;      // s_q and s_k, or total tokens
  int64_t page_size;           // 0: no pages
  int64_t bias[4];             // of dbias, 1 where it is reduced; the bias gradient's only
  bool bias_in_tiles = false;  // the copy engine can bring tiles of the bias
};

// The tiles of a kernel's grid, of query or of key rows.
struct TileGrid {
  int32_t block = 0;      // rows of a tile
  int64_t tiles = 0;      // of one head of one leading entry (of one batch entry when fixed)
  int64_t blocks = 0;     // thread blocks
  int64_t schedule = -1;  // where its schedule begins in the workspace; -1: the block's number tells its tile
};

// How decode shares the keys out. A column is a KV head, or a chunk of its query rows where they are many; a
// column's blocks take equal ranges of the tiles of keys of all sequences, or whole parts of a size that is
// given.
struct DecodeGrid {
  int32_t columns = 0;     // neighbouring blocks take neighbouring columns
  int32_t ranges = 0;      // blocks of a column
  int32_t parts = 0;       // of every sequence, 0: as many as the ranges cut
  int32_t part_tiles = 0;  // or tiles in every part, 0: none given
  int32_t slots = 0;       // for parts that are given: of a sequence
  int32_t packed_rows =
      0;  // of packed sequences: rows that decode takes, at most; longer ones are the forward's
  int64_t all_slots = 0;  // of a column, each for what a part leaves
  int64_t memory = -1;    // where they begin in the workspace; -1: no sequence is cut

  JF_HD bool fixed_parts() const { return parts > 0 || part_tiles > 0; }
  // Of packed sequences.
  JF_HD bool takes(int64_t q_len, int64_t group) const {
    return packed_rows > 0 && q_len * group <= packed_rows;
  }
};

// What a kernel does to scores beside the scale and the band: nothing; whatever a call has, or whatever but
// dropout; or one option alone, of which sm90's forward has kernels for all, the other forwards for dropout.
enum class ScoreKind { kPlain, kGeneral, kDropout, kDropoutAlone, kSegments, kAlibi, kSoftcap, kBias };

// What runs: the forward over query tiles; the backward over key tiles, which add dQ up in the accumulator
// or, where that has to be repeatable, leave it to a kernel over query tiles; the bias gradient over the
// tiles of dbias (its blocks are those of `queries`).
struct LaunchPlan {
  int32_t kernel = -1;  // index into the built rows; -1: `error` says why none runs
  ScoreKind score = ScoreKind::kPlain;
  TileGrid queries, keys;
  DecodeGrid decode;
  int32_t decode_kernel =
      -1;                    // of packed sequences: the one that runs first, for those of few rows; -1: none
  bool pairs = false;        // two blocks share what is copied, each with one of two neighbouring tiles
  int32_t workers = 0;       // thread blocks that share the tiles of queries out; 0: each tile has its own
  int64_t counter = -1;      // where the number of tiles taken lies in the workspace; -1: all are as long
  int64_t accumulator = -1;  // where dQ in float32 begins in the workspace; -1: none
  int64_t shared = 0;        // bytes of shared memory per block
  int64_t workspace = 0;     // bytes of the workspace that are used
  std::string error = {};

  bool general() const { return score != ScoreKind::kPlain; }
  std::string to_string(const KernelRow& row) const;
};

inline constexpr int32_t kHopperKeys = 128;  // of a tile of the sm90 family, but of rows for many keys
inline constexpr int32_t kHopperRows = 64;   // of a consumer, and of a tile for few queries

// Which kinds of score a row of that family is built for: tiles of more keys leave registers for no option,
// three consumers for no more than one, and these, where there are any, take what they can. One consumer is
// for plain calls, and so are teams.
constexpr bool hopper_holds(ScoreKind kind, int32_t head_dim, int32_t keys, int32_t consumers,
                            int32_t teams) {
  constexpr int32_t kThreeConsumers = 64;  // head dims that have them, at most
  const bool general = kind == ScoreKind::kGeneral || kind == ScoreKind::kDropout;
  if (keys > kHopperKeys || consumers == 1 || teams > 1) return kind == ScoreKind::kPlain;
  return consumers > 2 ? !general : general || head_dim > kThreeConsumers;
}

// Which of its rows have a plain kernel for pairs of blocks besides.
constexpr bool hopper_pairs(int32_t head_dim, int32_t keys) { return keys > kHopperKeys || head_dim == 256; }

inline constexpr int32_t kNoSequence = -1;

// One tile of query or key rows of one sequence: an entry of the varlen schedule, which the device builds
// from cu_seqlens. Rows [row, end) of the tile are written; those from q_len or k_len on are padding.
struct TileWork {
  int32_t index;  // the sequence, kNoSequence: tokens outside every sequence, or an empty entry
  int32_t q_begin, k_begin;
  int32_t q_len, k_len;
  int32_t row, end;
  int32_t tiles;  // of the sequence; 0: nothing to do

  JF_HD int32_t used_queries() const { return end < q_len ? end : q_len; }
  JF_HD int32_t used_keys() const { return end < k_len ? end : k_len; }
};
static_assert(sizeof(TileWork) == 32);

inline constexpr int64_t kBlockStateBytes = 512;       // of shared memory beside the tiles, at most
inline constexpr int64_t kHopperStateBytes = 2048;     // the same of the sm90 family, with its barriers
inline constexpr int64_t kHopperSharedBytes = 232448;  // of a block of that family, at most
inline constexpr int64_t kCounterBytes = 4;            // of LaunchPlan::counter
inline constexpr int64_t kSmallestBlock = 16;          // rows of a tile in kernels.def: bounds their number
inline constexpr int64_t kDecodeRows = 64;             // query rows of a KV head that decode takes, at most
inline constexpr int64_t kDecodeChunk = 16;            // rows of a column of decode in kernels.def, at most
inline constexpr int64_t kDecodeTile = 64;             // keys of a tile of decode in kernels.def, at least
inline constexpr int64_t kDecodeBlocks = 1024;  // of decode where they cut sequences: bounds what parts leave
inline constexpr int64_t kDecodePart = 2048;    // keys of a part in batch-invariant mode
inline constexpr int64_t kDecodeTargetBytes = 24;  // of decode::Target
inline constexpr int64_t kAlignment = 256;         // of the parts of the workspace

// Columns of a head in the accumulator of dQ: whole blocks of 16.
JF_HD int32_t accumulator_columns(int32_t head_dim) { return (head_dim + 15) / 16 * 16; }

// Tiles that one packed leading entry can need: those of its sequences and of the tokens before and after.
int64_t varlen_tiles(int64_t rows, int64_t sequences, int64_t block);

// Bytes of workspace that are enough on any device; jax_flash/workspace.py has the same formula.
int64_t workspace_bound(Pass pass, const AttentionSpec& spec, const Shapes& shapes);

LaunchPlan plan(Pass pass, const AttentionSpec& spec, const Shapes& shapes, const Device& device,
                std::span<const KernelRow> built);

Shapes shapes_of(const Problem& problem);

}  // namespace jax_flash
