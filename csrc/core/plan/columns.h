// The words of csrc/kernels.def. Only files that read the table include this one.
#pragma once

#include <cstdint>
#include <limits>

#include "core/plan/row.h"

namespace jax_flash::columns {

template <class Enum>
constexpr uint32_t bit(Enum value) {
  return 1u << static_cast<int32_t>(value);
}

inline constexpr Pass forward = Pass::kForward, backward = Pass::kBackward,
                      bias_gradient = Pass::kBiasGradient, decode = Pass::kDecode, tangent = Pass::kTangent,
                      append = Pass::kAppend;
inline constexpr uint32_t dense = bit(Loader::kDense), paged = bit(Loader::kPaged), both = dense | paged,
                          runtime = both;
inline constexpr Design tiles = Design::kTiles, one_tile = Design::kOneTile,
                        packed_heads = Design::kPackedHeads, split_keys = Design::kSplitKeys,
                        cluster = Design::kCluster, cluster_columns = Design::kClusterColumns,
                        latent = Design::kLatent, latent_few = Design::kLatentFew, tokens = Design::kTokens,
                        bulk = Design::kBulk, dynamic = Design::kDynamic;
inline constexpr uint32_t float16 = bit(DType::kF16), bfloat16 = bit(DType::kBF16), half = float16 | bfloat16,
                          single = bit(DType::kF32), float32 = single,
                          float8 = bit(DType::kF8E4M3) | bit(DType::kF8E5M2);
#define JF_SCORE(kind, name, ...) inline constexpr uint32_t name = bit(ScoreKind::k##kind);
#define JF_SCORES(name, kinds) inline constexpr uint32_t name = kinds;
#include "../../scores.def"
inline constexpr int32_t any = std::numeric_limits<int32_t>::max();

}  // namespace jax_flash::columns
