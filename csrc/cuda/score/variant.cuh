// A score variant: the policy of one kind of score (csrc/scores.def), which says
//   its inputs           reads() from global memory; Input: what is staged in shared memory per key tile
//   what it does to S    apply(), after prefetch(), which runs while S is being multiplied
//   its softmax          Softmax, start(), exponentiate(), drop()
//   its gradient         differentiate(), drop_gradient(), drop_weights()
// Steps that a kind does not define cost nothing at run time.
//
// ScoreVariant is the plain score, and the others derive from it; csrc/scores.def maps the kinds to them. S
// is the type of the accumulator that holds the scores of a consumer's or a warp's rows and a whole key tile:
// an Accumulator or a TransposedAccumulator. A kernel makes one variant object per key tile. `Tile` says
// where S lies, as ScoreTile does (score/operands.cuh): p, operands(), band(), row(), and key where
// kPositional.
#pragma once

#include <cuda_runtime_api.h>

#include "core/plan/launch_plan.h"
#include "core/problem.h"
#include "core/score.h"
#include "cuda/softmax.cuh"

namespace jax_flash {

// A score input says what a variant stages in shared memory per key tile. This one stages nothing.
struct NoScoreInput {
  static constexpr int kStages = 0, kBytes = 0;
  static constexpr int kWarps = 0;                   // producer warps that fill it
  static constexpr bool kLoaded = false;             // the load warp fills it
  static constexpr bool kSkipsUniformTiles = false;  // nothing is staged for query tiles of one segment
  struct Map {};                                     // its tensor map
  struct Buffer {};                                  // its tiles
  struct Pipe {                                      // its pipeline; init(releases expected from consumers)
    __device__ __forceinline__ void init(int) {}
  };
  static cudaError_t make_map(Map&, const Problem&) { return cudaSuccess; }
};

// The quantity with respect to which dS is the gradient.
enum class GradientOf {
  kProduct,  // scale · q·k
  kBias,     // the bias, which is added to softcap's result, or with bias_first to the product
};

template <class S>
struct ScoreVariant {
  static constexpr bool kGeneral = false;     // options are tested at run time
  static constexpr bool kPositional = false;  // apply() or exponentiate() needs Tile::key
  static constexpr bool kDropout = false;
  static constexpr bool kDropoutInSoftmax = false;  // dropout's numbers are drawn while P is computed
  static constexpr bool kScalesGradient = false;    // differentiate() changes dP
  static constexpr bool kFusesGradient = false;     // P and dS are left to fuse_gradient()
  static constexpr float kWeightScale = 1;          // what fuse_gradient() multiplies P by
  static constexpr bool reads(Operand) { return false; }
  template <class T, int N, int kStages, int kConsumers>
  using Input = NoScoreInput;
  // M: the type of the softmax's m.
  template <class T, class M = float>
  using Softmax = UnboundedSoftmax<S::kSlots, M>;

  // The softmax multiplies the scores that apply() or differentiate() leaves by this factor before it takes
  // 2^x of them.
  __device__ __forceinline__ static float power_scale(const AttentionSpec& spec) {
    return spec.scale * kLog2e;
  }

  // The constructor argument of a query tile's softmax: its scale, or the bound of a BoundedSoftmax.
  template <class Softmax>
  __device__ __forceinline__ static float start(const Problem& p) {
    return p.spec.scale * kLog2e;
  }

  // Computes what does not depend on S, while the tensor cores compute S. `key`: the tile's first.
  // kScalarDropout: dropout's numbers are drawn one by one (Dropout::needs_scalar_path()).
  template <bool kScalarDropout = false, class Tile>
  __device__ __forceinline__ void prefetch(const Tile&, int32_t) {}

  // S ← score(S), without the band's mask.
  template <class Scores, class Tile, class Softmax>
  __device__ __forceinline__ void apply(Scores&, const Tile&, const Softmax&) {}

  // m ← max(m, S); α; P = 2^(S − m) of the first `early` column tiles.
  template <bool kScalarDropout, class Scores, class Tile, class Softmax>
  __device__ __forceinline__ void exponentiate(Scores& s, const Tile&, Softmax& softmax,
                                               float (&alpha)[S::kSlots], int early) {
    softmax.update(s, alpha);
    softmax.exponentiate(s, 0, early);
  }

  // P ← drop(P), in the fragments of P V.
  template <class Fragments>
  __device__ __forceinline__ void drop(Fragments&) const {}

  // The remaining functions are the backward's steps; gradient.cuh calls them.
  // Computes what does not depend on S, while the tensor cores compute S.
  template <class Tile>
  __device__ __forceinline__ void prefetch_gradient(const Tile&) {}
  // dP ← drop(dP) / (1 − rate): before differentiate() with kScalesGradient, otherwise after it.
  template <class Tile>
  __device__ __forceinline__ void drop_gradient(S&, const Tile&) {}
  // S ← score(S), without the band's mask. With kScalesGradient also dP ← score'(S) ∘ dP; the caller has
  // subtracted delta from dP before.
  template <GradientOf kOf, class Tile>
  __device__ __forceinline__ void differentiate(S&, S&, const Tile&) {}
  // Replaces all other steps if kFusesGradient: S → kWeightScale · P and dP → dS, without the band's mask.
  // `rows` has lse(slot) and delta(slot); the function calls wait_dp() before it reads dP.
  template <class Tile, class Rows, class Wait>
  __device__ __forceinline__ void fuse_gradient(S&, S&, const Tile&, const Rows&, Wait) const {}
  // P ← drop(P) without the factor 1 / (1 − rate), after dS = P ∘ (dP − delta) has been computed from P.
  template <class Tile>
  __device__ __forceinline__ void drop_weights(S&, const Tile&) const {}
  // x ← −x where dropout drops the element. If another warp has dP, the sign tells it which elements are
  // dropped (tile_weights() in gradient.cuh).
  template <class Tile>
  __device__ __forceinline__ void mark_dropped(S&, const Tile&) const {}
};

template <class S>
using PlainScore = ScoreVariant<S>;

// The score type of kinds that a family has no kernels for.
template <class S>
struct none;

}  // namespace jax_flash
