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

// The first column of K and Q in shared memory: 0 or, if V is K, the first one that is not among the CTA's
// own columns, which begin with `own`.
template <class C>
__device__ __forceinline__ int32_t first_key_column(int32_t own) {
  return C::kSharedValues ? C::kValueDim - own : 0;
}

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

  // Starts the key tiles of a query tile, which are loaded from the last to the first. It is called with the
  // number of the one that is loaded first, and tile_of(n), the key tile with number n.
  template <class TileOf>
  __device__ __forceinline__ void begin(const Maps&, const BlockWork& work, int32_t, TileOf) {
    const int32_t kv_head = p.kv_head(work.head);
    key = coordinates_of(p.key, work, kv_head, work.tile.k_begin);
    value = coordinates_of(p.value, work, kv_head, work.tile.k_begin);
  }
  // Makes the loader copy columns of V from this one on. Call it after begin().
  __device__ __forceinline__ void begin_columns(int32_t column) { value.column = column; }
  // This thread has read the work that begin() was given.
  template <class Pipe>
  __device__ __forceinline__ void release(const Pipe& state, uint32_t use) const {
    state.release_by_thread(use);
  }
  // Called with the number of the tile that this warp loads next, before it waits for the tile's stage.
  template <class TileOf>
  __device__ __forceinline__ void look_up(const Maps&, int32_t, TileOf) const {}
  // Load keys, or values, [n · kN, (n + 1) · kN); `barrier` counts their bytes. K of a tile is loaded before
  // V of the previous tile.
  __device__ __forceinline__ void load_key(const Maps& maps, uint32_t tile, uint32_t barrier, int32_t n,
                                           int part, uint32_t loader) const {
    ptx::Coordinates at = key;
    at.column = first_key_column<C>(value.column) + part * C::KTile::kColumns;
    load<typename C::KTile, C::kKeyCluster>(tile, barrier, maps.key, at, n, loader);
  }
  __device__ __forceinline__ void load_value(const Maps& maps, uint32_t tile, uint32_t barrier,
                                             int32_t n) const {
    load<typename C::VTile, C::kMulticast>(tile, barrier, maps.value, value, n, kValueLoader);
  }

 private:
  template <class Tile, int kCluster>
  __device__ __forceinline__ void load(uint32_t tile, uint32_t barrier, const CUtensorMap& map,
                                       ptx::Coordinates at, int32_t n, uint32_t loader) const {
    at.row += n * C::kN;
    ptx::barrier_expect(barrier, Tile::kBytes);
    if (kCluster == 1 || ptx::cluster_rank() == loader) load_rows<Tile, kCluster>(tile, 0, map, barrier, at);
  }

  const Problem& p;
  ptx::Coordinates key, value;
};

// The same with a warp for K and one for V, as CTAs that share a query tile wait for each other's K.
template <class C>
struct ColumnsLoader : DenseLoader<C> {
  using DenseLoader<C>::DenseLoader;
  static constexpr int kWarps = 2;
};

// The same if V is K. The warp of V loads the CTA's own columns, which are the last parts of a K tile, too.
// The first parts are the other columns.
template <class C>
struct SharedColumnsLoader : ColumnsLoader<C> {
  using ColumnsLoader<C>::ColumnsLoader;
};
template <template <class> class>
inline constexpr bool kSharesValues = false;
template <>
inline constexpr bool kSharesValues<SharedColumnsLoader> = true;

}  // namespace jax_flash
