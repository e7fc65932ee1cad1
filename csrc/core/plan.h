// Until the kernels include what they use.
#pragma once

#include "core/families/hopper_layout.h"
#include "core/families/portable_layout.h"
#include "core/plan/call.h"
#include "core/plan/launch_plan.h"
#include "core/problem.h"

namespace jax_flash {
inline constexpr int32_t kHopperKeys = 128;
inline constexpr int32_t kHopperRows = 64;
inline constexpr int64_t kHopperStateBytes = 2048, kHopperSharedBytes = 232448;
constexpr bool hopper_holds(ScoreKind kind, int32_t head_dim, int32_t keys, int32_t consumers,
                            int32_t teams) {
  constexpr int32_t kThreeConsumers = 64;
  const bool general = kind == ScoreKind::kGeneral || kind == ScoreKind::kDropout;
  if (keys > kHopperKeys || consumers == 1 || teams > 1) return kind == ScoreKind::kPlain;
  return consumers > 2 ? !general : general || head_dim > kThreeConsumers;
}
constexpr bool hopper_pairs(int32_t head_dim, int32_t keys) { return keys > kHopperKeys || head_dim == 256; }
}  // namespace jax_flash
