// The score variants of the portable kernels, by kind.
#pragma once

#include <type_traits>

#include "core/plan/launch_plan.h"
#include "cuda/score/draft.cuh"
#include "cuda/score/dropout.cuh"
#include "cuda/score/general.cuh"
#include "cuda/score/variant.cuh"

namespace jax_flash {

template <ScoreKind kKind, class S>
struct PortableScoreOf;
#define JF_SCORE(kind, name, printed, inputs, option, served, portable, ...) \
  template <class S>                                                         \
  struct PortableScoreOf<ScoreKind::k##kind, S> : std::type_identity<portable<S>> {};
#include "scores.def"

// Only calls over pages have a draft mask, and the general kernel serves them.
template <ScoreKind kKind, class S, bool kPaged = false>
using PortableScore =
    std::conditional_t<kPaged && kKind == ScoreKind::kGeneral, WithDraftMask<GeneralScore<S>>,
                       typename PortableScoreOf<kKind, S>::type>;

// Whether a kind takes any combination of options. Each thread of such a kind's kernels holds adjacent keys.
constexpr bool is_general(ScoreKind kind) {
  return kind == ScoreKind::kGeneral || kind == ScoreKind::kGeneralDropout;
}

}  // namespace jax_flash
