// The ring of K and V tiles in shared memory, filled by cp.async some tiles ahead of the products.
//
// Copies are committed in the order K0 V0 K1 V1 …, one group each, empty past the last tile, so that waiting for a
// tile is waiting until 2 · (stages − 1) newer groups are left.
#pragma once

#include "cuda/tile/copy.cuh"

namespace jax_flash {

template <class C>
class KvRing {
 public:
  using T = typename C::Element;

  // Tiles [first, last) of `block_n` keys each; keys from `end` on read as zeros.
  __device__ __forceinline__ KvRing(uint32_t shared, GlobalRows<const T> key, GlobalRows<const T> value, int32_t first,
                                    int32_t last, int32_t end)
      : shared_(shared), key_(key), value_(value), last_(last), end_(end), k_next_(first), v_next_(first) {}

  // Joins the first group: what the caller loaded before (Q) arrives with the first K.
  __device__ __forceinline__ void start() {
    for (int i = 0; i < C::kStages; ++i) {
      fill_k();
      if (i + 1 < C::kStages) fill_v();
    }
  }

  // The K tile of step `i`. Everyone has left the V tile of the step before, so its place is refilled.
  __device__ __forceinline__ uint32_t wait_k(int i) {
    ptx::cp_async_wait<2 * (C::kStages - 1)>();
    __syncthreads();
    fill_v();
    return k_place(i);
  }

  // The V tile of step `i`. Everyone has left the K tile of this step, so its place is refilled.
  __device__ __forceinline__ uint32_t wait_v(int i) {
    ptx::cp_async_wait<2 * (C::kStages - 1)>();
    __syncthreads();
    fill_k();
    return v_place(i);
  }

 private:
  __device__ __forceinline__ uint32_t k_place(int i) const { return shared_ + i % C::kStages * C::KTile::kBytes; }
  __device__ __forceinline__ uint32_t v_place(int i) const {
    return shared_ + C::kStages * C::KTile::kBytes + i % C::kStages * C::VTile::kBytes;
  }

  __device__ __forceinline__ void fill_k() {
    if (k_next_ < last_) load_tile<typename C::KTile, C::kThreads>(k_place(k_step_), key_, k_next_ * C::kN, end_);
    ptx::cp_async_commit();
    ++k_next_, ++k_step_;
  }

  __device__ __forceinline__ void fill_v() {
    if (v_next_ < last_) load_tile<typename C::VTile, C::kThreads>(v_place(v_step_), value_, v_next_ * C::kN, end_);
    ptx::cp_async_commit();
    ++v_next_, ++v_step_;
  }

  uint32_t shared_;
  GlobalRows<const T> key_, value_;
  int32_t last_, end_;
  int32_t k_next_, v_next_;
  int32_t k_step_ = 0, v_step_ = 0;
};

}  // namespace jax_flash
