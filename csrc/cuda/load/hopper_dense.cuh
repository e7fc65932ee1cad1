// The loader of contiguous rows of keys and values, for the sm_90a kernels. One thread issues a TMA box for
// each 64 columns of a tile. With 2-CTA clusters one CTA multicasts K, the other V.
//
// A loader is a template parameter of a kernel's config C (KTile, VTile, kN, kMulticast, kSharers), used as
// here; see load/hopper_pages.cuh for the other one.
#pragma once

#include <cstdint>

#include "cuda/hopper/roles.cuh"
#include "cuda/hopper/tma.cuh"

namespace jax_flash {

template <class C>
class DenseLoader {
 public:
  static constexpr int kWarps = 1, kLanes = 1;  // the first kLanes of each of kWarps warps load
  struct Maps {
    CUtensorMap key, value;
  };
  static cudaError_t make_maps(Maps& maps, const Problem& p) {
    constexpr int kPanels[] = {C::KTile::kPanel * 8, C::VTile::kPanel * 8};
    const int32_t batch = p.packed() ? 1 : p.batch;
    cudaError_t e =
        make_tensor_map(maps.key, p, p.key, {p.head_dim, p.kv_heads, p.k_rows, batch, kPanels[0], C::kN});
    if (e == cudaSuccess)
      e = make_tensor_map(maps.value, p, p.value,
                          {p.value_dim, p.kv_heads, p.k_rows, batch, kPanels[1], C::kN});
    return e;
  }

  __device__ __forceinline__ explicit DenseLoader(const Problem& problem) : p(problem) {}

  // Starts the key tiles [tiles.lo, tiles.hi) of a query tile, which are loaded from the last to the first.
  __device__ __forceinline__ void begin(const Maps&, const BlockWork& work, const Interval&) {
    const int32_t kv_head = p.kv_head(work.head);
    key = coordinates_of(p.key, work, kv_head, work.tile.k_begin);
    value = coordinates_of(p.value, work, kv_head, work.tile.k_begin);
  }
  // Makes the loader copy columns of V, and of K if CTAs share the query tile, from this one on. Call it
  // after begin().
  __device__ __forceinline__ void begin_columns(int32_t column) {
    if constexpr (C::kSharers > 1) key.column = column;
    value.column = column;
  }
  // This thread has read the work that begin() was given.
  template <class Pipe>
  __device__ __forceinline__ void release(const Pipe& state, uint32_t use) const {
    state.release_by_thread(use);
  }
  // Called before the wait for the stage of the next load_key() or load_value().
  __device__ __forceinline__ void check() const {}
  // Load kN keys, or values, from n · kN + left_out on; `barrier` counts their bytes. K of a tile is loaded
  // before V of the previous tile.
  __device__ __forceinline__ void load_key(const Maps& maps, uint32_t tile, uint32_t barrier, int32_t n,
                                           int32_t left_out = 0) const {
    load<typename C::KTile, kKeyLoader>(tile, barrier, maps.key, key, n * C::kN + left_out);
  }
  __device__ __forceinline__ void load_value(const Maps& maps, uint32_t tile, uint32_t barrier, int32_t n,
                                             int32_t left_out = 0) const {
    load<typename C::VTile, kValueLoader>(tile, barrier, maps.value, value, n * C::kN + left_out);
  }

 private:
  template <class Tile, uint32_t kLoader>
  __device__ __forceinline__ void load(uint32_t tile, uint32_t barrier, const CUtensorMap& map,
                                       ptx::Coordinates at, int32_t row) const {
    at.row += row;
    ptx::barrier_expect(barrier, Tile::kBytes);
    if (C::kMulticast == 1 || ptx::cluster_rank() == kLoader)
      load_rows<Tile, C::kMulticast>(tile, 0, map, barrier, at);
  }

  const Problem& p;
  ptx::Coordinates key, value;
};

// The same where V is K: each tile is loaded once, and both products read it.
template <class C>
struct SharedKvLoader : DenseLoader<C> {
  using DenseLoader<C>::DenseLoader;
};
template <template <class> class Loader>
inline constexpr bool kValuesAreKeys = false;
template <>
inline constexpr bool kValuesAreKeys<SharedKvLoader> = true;

}  // namespace jax_flash
