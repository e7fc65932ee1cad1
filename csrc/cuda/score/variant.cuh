// A score variant of the sm_90a kernels: what a kernel computes between S = Q Kᵀ and P V for one kind of
// score (core/plan.h's ScoreKind), with nothing asked for at run time that the kind leaves out.
//
// This is the plain score, and what every other variant (score/variants.cuh lists them) leaves as it is. S:
// the accumulator of a consumer's whole key tile; functions also take accumulators of fewer keys. One object
// lives as long as a key tile. `Tile` tells it where the tile lies: p, operands(), band(), row(), key(),
// group, input(), input_use.
#pragma once

#include <cuda_runtime_api.h>

#include "core/plan.h"
#include "core/score.h"
#include "core/spec.h"
#include "cuda/softmax.cuh"

namespace jax_flash {

// What a variant stages in shared memory per key tile: nothing.
struct NoScoreInput {
  static constexpr int kStages = 0, kBytes = 0;
  static constexpr int kWarps = 0;               // of its own, among the producers
  static constexpr bool kLoaded = false;         // by the load warp
  static constexpr bool kTrimsKeyRange = false;  // a further warp leaves out key tiles of a query tile
  struct Map {};
  struct Buffer {};
  struct Pipe {
    __device__ __forceinline__ void init(int) {}
  };
  static cudaError_t make_map(Map&, const Problem&) { return cudaSuccess; }
};

template <class S>
struct ScoreVariant {
  static constexpr int kKeys = 8 * S::kColumnTiles;  // of a tile
  static constexpr bool kGeneral = false;            // several options, asked for at run time
  static constexpr bool kPositional = false;         // depends on where the tile lies
  static constexpr bool kDropout = false;
  static constexpr bool kDropoutInSoftmax = false;  // dropout's numbers are drawn beside the exponentials
  template <class T, int kKeys, int kStages, int kConsumers>
  using Input = NoScoreInput;
  template <class T>
  using Softmax = UnboundedSoftmax<S::kSlots, float>;

  // The softmax of a query tile, whose `scale` turns what apply() leaves into powers of two.
  template <class Softmax>
  static __device__ __forceinline__ Softmax start(const AttentionSpec& spec) {
    return Softmax(spec.scale * kLog2e);
  }

  // While S is being multiplied.
  template <bool kScalarDropout, class Tile>
  __device__ __forceinline__ void prefetch(const Tile&, int32_t) {}

  // S ← score(S), but for the band.
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
