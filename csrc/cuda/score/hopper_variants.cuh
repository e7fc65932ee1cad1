// The score variants of the sm_90a kernels, by kind.
#pragma once

#include <type_traits>

#include "core/plan/launch_plan.h"
#include "cuda/score/alibi.cuh"
#include "cuda/score/draft.cuh"
#include "cuda/score/dropout.cuh"
#include "cuda/score/hopper_bias.cuh"
#include "cuda/score/hopper_general.cuh"
#include "cuda/score/hopper_segments.cuh"
#include "cuda/score/softcap.cuh"
#include "cuda/score/variant.cuh"

namespace jax_flash {

template <ScoreKind kKind, class S>
struct HopperScoreOf;
template <class S>
struct HopperScoreOf<ScoreKind::kPlain, S> : std::type_identity<PlainScore<S>> {};
template <class S>
struct HopperScoreOf<ScoreKind::kGeneral, S> : std::type_identity<HopperGeneralScore<S>> {};
template <class S>
struct HopperScoreOf<ScoreKind::kGeneralDropout, S> : std::type_identity<HopperGeneralDropoutScore<S>> {};
template <class S>
struct HopperScoreOf<ScoreKind::kDropout, S> : std::type_identity<DropoutScore<S>> {};
template <class S>
struct HopperScoreOf<ScoreKind::kSegments, S> : std::type_identity<SegmentScore<S>> {};
template <class S>
struct HopperScoreOf<ScoreKind::kAlibi, S> : std::type_identity<AlibiScore<S>> {};
template <class S>
struct HopperScoreOf<ScoreKind::kSoftcap, S> : std::type_identity<SoftcapScore<S>> {};
template <class S>
struct HopperScoreOf<ScoreKind::kBias, S> : std::type_identity<BiasScore<S>> {};

// Only calls over pages have a draft mask, and the general kernel serves them.
template <ScoreKind kKind, class S, bool kPaged = false>
using HopperScore =
    std::conditional_t<kPaged && kKind == ScoreKind::kGeneral, WithDraftMask<HopperGeneralScore<S>>,
                       typename HopperScoreOf<kKind, S>::type>;

}  // namespace jax_flash
