// A row of csrc/kernels.def: what a kernel computes, its design, its tile and its variants.
#pragma once

#include <cstdint>

#include "core/spec.h"

namespace jax_flash {

struct Family;

// An arch name of csrc/kernels.def: the devices that its machine code or PTX runs on, and the code family
// that its kernels are instantiated from.
struct Arch {
  const char* name;  // "sm90"
  int32_t oldest;    // compute capabilities, 90 for 9.0
  int32_t newest;
  const Family& (*family)();

  bool covers(int32_t capability) const { return oldest <= capability && capability <= newest; }
};

// Where a kernel loads keys and values from; the value is the bit in Row::loaders.
enum class Loader : int32_t { kDense = 0, kPaged = 1 };

// The kinds of scores that kernels compute (csrc/scores.def); the value is the bit in Row::scores.
enum class ScoreKind : int32_t {
#define JF_SCORE(kind, ...) k##kind,
#include "../../scores.def"
};

inline constexpr int32_t kScoreKinds = 0
#define JF_SCORE(...) +1
#include "../../scores.def"
    ;

// The tiles of bias and mask that the gradients of a kind stage on sm_90a, as bits.
enum ScoreTileSet { kBiasTiles = 1, kMaskTiles = 2, kFloatBiasTiles = 4 };
inline constexpr int32_t kScoreTileSets[] = {
#define JF_SCORE(kind, name, printed, inputs, option, served, portable, hopper, gradient, tiles) tiles,
#include "../../scores.def"
};
constexpr bool stages(ScoreKind kind, int32_t tiles) {
  return kScoreTileSets[static_cast<int32_t>(kind)] & tiles;
}
constexpr bool stages_mask(ScoreKind kind) { return stages(kind, kMaskTiles); }

// Whether a kind's kernels go through lists of tiles (core/visible/key_tiles.h).
constexpr bool lists_tiles(ScoreKind kind) {
  return kind == ScoreKind::kBlocks || kind == ScoreKind::kListedMask;
}

// The algorithm of a kernel. csrc/kernels.def describes them.
enum class Design : int32_t {
  kTiles,
  kOneTile,
  kPackedHeads,
  kSplitKeys,
  kCluster,
  kClusterColumns,
  kLatent,
  kLatentFew,
  kTokens,
  kBulk,
  kDynamic
};

// The slices that `columns` of a head are cut into; at least one, since every query row has statistics.
constexpr JF_HD int32_t slices_of(int32_t columns, int32_t slice_columns) {
  return columns > 0 ? (columns - 1) / slice_columns + 1 : 1;
}

// The columns of csrc/kernels.def but the arch: data for the plan, and a template argument of the kernel.
struct Row {
  Pass pass;
  Design design;
  uint32_t loaders;             // bit set of Loader; a built kernel has one, or chooses at run time
  uint32_t elements;            // bit set of DType: of query (one in a built kernel), and float8 of pages
  int32_t head_dim, value_dim;  // 0: any
  int32_t block_m, block_n;     // rows of queries and of keys in a tile
  int32_t stages, warps;
  int32_t teams;      // groups of consumer warpgroups in a CTA, each with its own query tiles
  int32_t multicast;  // 2: the plain kernel is also built for clusters of 2 CTAs that share loads of K and V
  int32_t blocks;     // CTAs per SM that the registers must allow
  uint32_t scores;    // bit set of ScoreKind

  constexpr bool takes(DType dtype) const { return elements >> static_cast<int32_t>(dtype) & 1; }
  constexpr bool takes(Loader loader) const { return loaders >> static_cast<int32_t>(loader) & 1; }
  constexpr bool takes(ScoreKind kind) const { return scores >> static_cast<int32_t>(kind) & 1; }
  constexpr bool is_paged() const { return loaders == 1u << static_cast<int32_t>(Loader::kPaged); }
  constexpr bool is_one_tile() const { return design == Design::kOneTile; }
  constexpr bool packs_heads() const { return design == Design::kPackedHeads; }
  // Kernels for options need more registers than the plain one, which `blocks` is chosen for.
  constexpr int32_t blocks_for(ScoreKind kind) const {
    return kind == ScoreKind::kPlain ? blocks : is_one_tile() ? (blocks + 1) / 2 : 1;
  }
  constexpr bool is_latent() const { return design == Design::kLatent || design == Design::kLatentFew; }

  // Columns of V and O in a tile. Up to this width O of 16 query rows fits in a warp's registers. Wider
  // values are cut into slices, each with its own CTAs, which compute S again, or are divided among the CTAs
  // of a cluster, which compute S together.
  static constexpr int32_t kSliceColumns = 256;
  constexpr int32_t slice_columns() const { return value_dim < kSliceColumns ? value_dim : kSliceColumns; }
  constexpr bool is_sliced() const { return value_dim > kSliceColumns && design != Design::kClusterColumns; }

  // The row with another tile shape, because a kernel for score options may need smaller tiles.
  constexpr Row with_tile(int32_t m, int32_t n) const {
    Row row = *this;
    row.block_m = m, row.block_n = n;
    return row;
  }
};

struct KernelRow : Row {
  const Arch* arch;
};

const char* name_of(Design design);
const char* name_of(Pass pass);
const char* name_of(Loader loader);
const char* name_of(ScoreKind kind);
const char* name_of(DType dtype);

}  // namespace jax_flash
