// The ring of K and V tiles in shared memory, filled by cp.async some tiles ahead of the products.
//
// Copies are committed in the order K0 V0 K1 V1 …, one group each, empty past the last tile, so that waiting
// for a tile is waiting until 2 · (stages − 1) newer groups are left.
#pragma once

#include "core/band.h"
#include "cuda/tile/copy.cuh"

namespace jax_flash {

template <class C>
class KvRing {
 public:
  using T = typename C::Element;

  // `tiles` of C::kN keys each; keys from `end` on read as zeros. The references are to shared memory.
  __device__ __forceinline__ KvRing(uint32_t shared, const GlobalRows<const T>& key,
                                    const GlobalRows<const T>& value, const Interval& tiles,
                                    const int32_t& end)
      : shared_(shared), key_(key), value_(value), tiles_(tiles), end_(end) {}

  // Joins the first group: what the caller loaded before (Q) arrives with the first K.
  __device__ __forceinline__ void start() {
    for (int i = 0; i < C::kStages; ++i) {
      fill_k(tiles_.lo + i);
      if (i + 1 < C::kStages) fill_v(tiles_.lo + i);
    }
  }

  // The K tile `n`. Everyone has left the V tile before it, whose place is refilled.
  __device__ __forceinline__ uint32_t wait_k(int32_t n) {
    ptx::cp_async_wait<2 * (C::kStages - 1)>();
    __syncthreads();
    fill_v(n + C::kStages - 1);
    return k_place(n);
  }

  // The V tile `n`. Everyone has left the K tile `n`, whose place is refilled.
  __device__ __forceinline__ uint32_t wait_v(int32_t n) {
    ptx::cp_async_wait<2 * (C::kStages - 1)>();
    __syncthreads();
    fill_k(n + C::kStages);
    return v_place(n);
  }

 private:
  __device__ __forceinline__ uint32_t k_place(int32_t n) const {
    return shared_ + n % C::kStages * C::KTile::kBytes;
  }
  __device__ __forceinline__ uint32_t v_place(int32_t n) const {
    return shared_ + C::kStages * C::KTile::kBytes + n % C::kStages * C::VTile::kBytes;
  }

  __device__ __forceinline__ void fill_k(int32_t n) {
    if (n < tiles_.hi) load_tile<typename C::KTile, C::kThreads>(k_place(n), key_, n * C::kN, end_);
    ptx::cp_async_commit();
  }
  __device__ __forceinline__ void fill_v(int32_t n) {
    if (n < tiles_.hi) load_tile<typename C::VTile, C::kThreads>(v_place(n), value_, n * C::kN, end_);
    ptx::cp_async_commit();
  }

  uint32_t shared_;
  const GlobalRows<const T>&key_, &value_;
  const Interval& tiles_;
  const int32_t& end_;
};

}  // namespace jax_flash
