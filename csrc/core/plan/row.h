// A row of csrc/kernels.def as data: one kernel, by what it computes, its tile and its variants.
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

// Where a kernel's keys and values come from; the value is the bit in KernelRow::loaders.
enum class Loader : int32_t { kDense = 0, kPaged = 1 };

// The score options that a kernel computes, after the scale and the band; the value is the bit in
// KernelRow::scores.
enum class ScoreKind : int32_t {
  kPlain,           // nothing
  kGeneral,         // any combination of options, without dropout
  kGeneralDropout,  // any combination of options, dropout too
  kDropout,         // dropout and no other option; likewise the next ones
  kSegments,
  kAlibi,
  kSoftcap,
  kBias,
  kMask,
};

// The columns of a built row, as a template argument.
struct RowColumns {
  uint32_t loaders;
  int32_t head_dim, value_dim, block_m, block_n, stages, warps, teams, cluster, blocks;
  uint32_t scores;

  constexpr bool takes(ScoreKind kind) const { return scores >> static_cast<int32_t>(kind) & 1; }
  constexpr bool is_paged() const { return loaders == 1u << static_cast<int32_t>(Loader::kPaged); }
};

inline constexpr int32_t kScoreKinds = 9;

struct KernelRow {
  const Arch* arch;
  Pass pass;
  uint32_t loaders;  // bit set of Loader; a built kernel has one, decode's both
  uint32_t dtypes;   // bit set of DType; a built kernel has one
  int32_t head_dim, value_dim;
  int32_t block_m, block_n;  // rows of queries and of keys in a tile
  int32_t stages, warps;
  int32_t teams;    // of consumer warpgroups in a CTA, each with query tiles of its own
  int32_t cluster;  // 2: the plain kernel is also built for 2-CTA clusters; a backward: for those alone
  int32_t blocks;   // CTAs per SM that the registers must allow
  uint32_t scores;  // bit set of ScoreKind

  bool takes(DType dtype) const { return dtypes >> static_cast<int32_t>(dtype) & 1; }
  bool takes(Loader loader) const { return loaders >> static_cast<int32_t>(loader) & 1; }
  bool takes(ScoreKind kind) const { return scores >> static_cast<int32_t>(kind) & 1; }
};

const char* name_of(Pass pass);
const char* name_of(Loader loader);
const char* name_of(ScoreKind kind);
const char* name_of(DType dtype);

}  // namespace jax_flash
