// Accumulators spread over a warp's registers, and the products of attention on them.
#pragma once

#include <cstdint>

#include "cuda/tile/accumulator.cuh"
#include "cuda/tile/operands.cuh"

namespace jax_flash {

// Steps of k written out one after the other. float32 has twice as many, of nine times the instructions; from
// registers it has to be all.
template <class T, int kSteps, class A>
inline constexpr int kUnrolled = sizeof(T) == 2 || A::kInRegisters ? kSteps : 2;

// C += A B at step k; A and B are readers of tile/operands.cuh.
template <class T, class A, class B, class C>
__device__ __forceinline__ void multiply_add_step(C& c, const A& a, const B& b, int k) {
  uint32_t af[C::kRowTiles][4];
#pragma unroll
  for (int m = 0; m < C::kRowTiles; ++m) a.load(af[m], m, k);
#pragma unroll
  for (int n = 0; n < C::kColumnTiles; n += 2) {
    uint32_t bf[4];
    b.load(bf, n, k);
#pragma unroll
    for (int m = 0; m < C::kRowTiles; ++m) {
      ptx::mma<T>(c.x[m][n], af[m], bf[0], bf[1]);
      ptx::mma<T>(c.x[m][n + 1], af[m], bf[2], bf[3]);
    }
  }
}

// The same over `kSteps` steps.
template <class T, int kSteps, class A, class B, class C>
__device__ __forceinline__ void multiply_add(C& c, const A& a, const B& b) {
#pragma unroll kUnrolled < T, kSteps, A>
  for (int k = 0; k < kSteps; ++k) multiply_add_step<T>(c, a, b, k);
}

// S = Q Kᵀ: Q [16 · row tiles, d] from `row` of its tile on, K [keys, d] from `key` on.
template <class QTile, class KTile, class S>
__device__ __forceinline__ void mma_qk(S& s, uint32_t q, int row, uint32_t k, int key = 0) {
  using T = typename QTile::Element;
  s.clear();
  multiply_add<T, QTile::kChunks / 2>(s, RowsA<QTile>(q, row), RowsB<KTile>(k, key));
}

// O += P V: P in registers, rounded to T on the way (C's layout is A's), V [keys, dv].
template <class VTile, class O, class P>
__device__ __forceinline__ void mma_pv(O& o, const P& p, uint32_t v) {
  using T = typename VTile::Element;
  multiply_add<T, P::kColumnTiles * 8 / kStepK<T>>(o, RegistersA<T, P>{p}, ColumnsB<VTile, 16, true>(v, 0));
}

}  // namespace jax_flash
