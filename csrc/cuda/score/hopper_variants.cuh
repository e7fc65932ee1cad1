// The score variants of the sm_90a kernels, by kind.
#pragma once

#include <type_traits>

#include "core/plan/launch_plan.h"
#include "cuda/score/alibi.cuh"
#include "cuda/score/draft.cuh"
#include "cuda/score/dropout.cuh"
#include "cuda/score/hopper_bias.cuh"
#include "cuda/score/hopper_bias_beside.cuh"
#include "cuda/score/hopper_blocks.cuh"
#include "cuda/score/hopper_general.cuh"
#include "cuda/score/hopper_mask.cuh"
#include "cuda/score/hopper_mask_dropout.cuh"
#include "cuda/score/hopper_ranges.cuh"
#include "cuda/score/hopper_segments.cuh"
#include "cuda/score/softcap.cuh"
#include "cuda/score/variant.cuh"

namespace jax_flash {

template <ScoreKind kKind, class S>
struct HopperScoreOf;
#define JF_SCORE(kind, name, printed, inputs, option, served, portable, hopper, ...) \
  template <class S>                                                                 \
  struct HopperScoreOf<ScoreKind::k##kind, S> : std::type_identity<hopper<S>> {};
#include "scores.def"

// Only calls over pages have a draft mask, and the general kernel serves them.
template <ScoreKind kKind, class S, bool kPaged = false>
using HopperScore =
    std::conditional_t<kPaged && kKind == ScoreKind::kGeneral, WithDraftMask<HopperGeneralScore<S>>,
                       typename HopperScoreOf<kKind, S>::type>;

}  // namespace jax_flash
