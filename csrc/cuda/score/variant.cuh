// A score variant of the sm_90a kernels: what a kernel computes between S = Q Kᵀ and P V for one kind of
// score (core/plan/row.h's ScoreKind). What the kind leaves out costs nothing at run time.
//
// ScoreVariant is the plain score; the others derive from it (score/variants.cuh has the list) and say their
// input, their softmax and what they do to S. S is the accumulator of a consumer's whole key tile; functions
// also take accumulators of fewer keys. One object lives as long as a key tile. `Tile` is the kernel's
// ScoreTile: p, operands(), band(), row(), consumer, shared, input_use, and key where kPositional.
#pragma once

#include <cuda_runtime_api.h>

#include "core/plan/launch_plan.h"
#include "core/problem.h"
#include "core/score.h"
#include "cuda/softmax.cuh"

namespace jax_flash {

// A score input: what a variant stages in shared memory per key tile. Here nothing.
struct NoScoreInput {
  static constexpr int kStages = 0, kBytes = 0;
  static constexpr int kWarps = 0;               // producer warps that fill it
  static constexpr bool kLoaded = false;         // whether the load warp does
  static constexpr bool kTrimsKeyRange = false;  // whether one more warp leaves out key tiles
  struct Map {};                                 // its tensor map
  struct Buffer {};                              // its tiles
  struct Pipe {                                  // its pipeline; init() takes the consumers' releases
    __device__ __forceinline__ void init(int) {}
  };
  static cudaError_t make_map(Map&, const Problem&) { return cudaSuccess; }
};

template <class S>
struct ScoreVariant {
  static constexpr int kKeys = 8 * S::kColumnTiles;  // of a tile
  static constexpr bool kGeneral = false;            // which options there are is asked for at run time
  static constexpr bool kPositional = false;         // apply() or exponentiate() needs Tile::key
  static constexpr bool kDropout = false;
  static constexpr bool kDropoutInSoftmax = false;  // dropout's numbers are drawn in exponentiate()
  template <class T, int N, int kStages, int kConsumers>
  using Input = NoScoreInput;
  template <class T>
  using Softmax = UnboundedSoftmax<S::kSlots, float>;

  // The softmax of a query tile, whose `scale` turns what apply() leaves into powers of two.
  template <class Softmax>
  static __device__ __forceinline__ Softmax start(const AttentionSpec& spec) {
    return Softmax(spec.scale * kLog2e);
  }

  // Runs while S is being multiplied: what can be computed without it. `n`: the key tile. kScalarDropout:
  // dropout's numbers are computed one by one, as Dropout::odd() asks for.
  template <bool kScalarDropout, class Tile>
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
};

template <class S>
using PlainScore = ScoreVariant<S>;

}  // namespace jax_flash
