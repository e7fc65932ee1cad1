// The products of attention by mma.sync, on accumulators in a warp's registers.
#pragma once

#include <cstdint>

#include "cuda/tile/accumulator.cuh"
#include "cuda/tile/operands.cuh"

namespace jax_flash {

// k steps that multiply_add_step() takes at once.
template <class T>
inline constexpr int kStepsAtOnce = static_cast<int>(sizeof(T)) / 2;

// How often the loop over k is unrolled. float32 has several times the instructions, so it is not, except for
// an A in registers, which must be indexed at compile time.
template <class T, int kSteps, class A>
inline constexpr int kUnrolled = sizeof(T) == 2 || A::kInRegisters ? kSteps : 1;

// C += A B for kStepsAtOnce k steps. A and B are operands of tile/operands.cuh.
template <class T, class A, class B, class C>
__device__ __forceinline__ void multiply_add_step(C& c, const A& a, const B& b, int k) {
  constexpr int kSteps = kStepsAtOnce<T>;
  ptx::Operand<T, 4> as[C::kRowTiles][kSteps];
#pragma unroll
  for (int m = 0; m < C::kRowTiles; ++m) {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      uint32_t x[4];
      a.load(x, m, k + i);
      as[m][i].set(x);
    }
  }
#pragma unroll
  for (int n = 0; n < C::kColumnTiles; n += 2) {
    ptx::Operand<T, 2> first[kSteps], second[kSteps];
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      uint32_t x[4];
      b.load(x, n, k + i);
      first[i].set({x[0], x[1]}), second[i].set({x[2], x[3]});
    }
#pragma unroll
    for (int m = 0; m < C::kRowTiles; ++m) {
      ptx::mma_steps(c.x[m][n], as[m], first);
      ptx::mma_steps(c.x[m][n + 1], as[m], second);
    }
  }
}

// C += A B over kSteps k steps.
template <class T, int kSteps, class A, class B, class C>
__device__ __forceinline__ void multiply_add(C& c, const A& a, const B& b) {
  static_assert(kSteps % kStepsAtOnce<T> == 0);
#pragma unroll kUnrolled < T, kSteps, A>
  for (int k = 0; k < kSteps; k += kStepsAtOnce<T>) multiply_add_step<T>(c, a, b, k);
}

// S = Q Kᵀ for rows [row, row + 16 · row tiles) of the tile of Q [M, d] and keys from `key` on of the tile of
// K [N, d].
template <class QTile, class KTile, class S>
__device__ __forceinline__ void mma_qk(S& s, uint32_t q, int row, uint32_t k, int key = 0) {
  using T = typename QTile::Element;
  s.clear();
  multiply_add<T, QTile::kChunks / 2>(s, RowsA<QTile>(q, row), RowsB<KTile>(k, key));
}

// O += P V for P in registers, rounded to T (mma's C layout is its A layout), and a tile of V [N, dv].
template <class VTile, class O, class P>
__device__ __forceinline__ void mma_pv(O& o, const P& p, uint32_t v) {
  using T = typename VTile::Element;
  multiply_add<T, P::kColumnTiles * 8 / kStepK<T>>(o, RegistersA<T, P>{p}, ColumnsB<VTile, 16, true>(v, 0));
}

}  // namespace jax_flash
