// The loader of listed key tiles (core/visible/key_tiles.h) in the sm_90a kernels. One thread issues a TMA
// box for each panel of columns of each piece of K or V.
#pragma once

#include <cstdint>

#include "core/visible/key_tiles.h"
#include "cuda/hopper/tma.cuh"

namespace jax_flash {

template <class C>
class ListLoader {
 public:
  static constexpr int kWarps = 1, kLanes = 1;
  struct Maps {
    CUtensorMap key, value;
  };
  // `keys`: the number of keys in a piece.
  static cudaError_t make_maps(Maps& maps, const Problem& p, int32_t keys) {
    constexpr int kPanels[] = {C::KTile::kPanel * 8, C::VTile::kPanel * 8};
    cudaError_t e =
        make_tensor_map(maps.key, p, p.key, {p.head_dim, p.kv_heads, p.k_rows, p.batch, kPanels[0], keys});
    if (e == cudaSuccess)
      e = make_tensor_map(maps.value, p, p.value,
                          {p.value_dim, p.kv_heads, p.k_rows, p.batch, kPanels[1], keys});
    return e;
  }

  __device__ __forceinline__ explicit ListLoader(const Problem& problem) : p(problem) {}

  // Begins a query tile, whose key tiles consist of pieces of `keys_of_piece` keys.
  __device__ __forceinline__ void begin(const BlockWork& work, int32_t keys_of_piece) {
    const int32_t kv_head = p.kv_head(work.head);
    key = coordinates_of(p.key, work, kv_head, 0);
    value = coordinates_of(p.value, work, kv_head, 0);
    keys = keys_of_piece;
  }
  template <class Pipe>
  __device__ __forceinline__ void release(const Pipe& state, uint32_t use) const {
    state.release_by_thread(use);
  }
  __device__ __forceinline__ void load_key(const Maps& maps, uint32_t tile, uint32_t barrier,
                                           const KeyPieces& pieces, int, uint32_t) const {
    load<typename C::KTile>(tile, barrier, maps.key, key, pieces);
  }
  __device__ __forceinline__ void load_value(const Maps& maps, uint32_t tile, uint32_t barrier,
                                             const KeyPieces& pieces) const {
    load<typename C::VTile>(tile, barrier, maps.value, value, pieces);
  }

 private:
  template <class Tile>
  __device__ __forceinline__ void load(uint32_t tile, uint32_t barrier, const CUtensorMap& map,
                                       ptx::Coordinates at, const KeyPieces& pieces) const {
    ptx::barrier_expect(barrier, Tile::kBytes);
#pragma unroll 1
    for (int32_t i = 0, row = 0; row < C::kN; ++i, row += keys) {
      at.row = KeyPieces::key<C::kConsumers>(pieces.piece[i]);
      load_rows<Tile>(tile, row, map, barrier, at);
    }
  }

  const Problem& p;
  ptx::Coordinates key, value;
  int32_t keys;
};

}  // namespace jax_flash
