// The producer of cuda/forward/sm90.cuh that has operands copied, and where keys and values come from.
#pragma once

#include <cstdint>

#include "cuda/forward/sm90_shared.cuh"

namespace jax_flash {

__device__ __forceinline__ ptx::Coordinates place(const View& view, const BlockWork& work, int32_t head,
                                                  int32_t row) {
  return {0, head, row, work.batch_row, view.leading[0] ? static_cast<int32_t>(work.leading) : 0};
}

// Rows [first, first + the map's box) of a tile, at row `first` in shared memory too; of kBlocks blocks.
template <class Tile, int kBlocks = 1>
__device__ __forceinline__ void copy_rows(uint32_t tile, int32_t first, const CUtensorMap& map,
                                          uint32_t barrier, ptx::Coordinates at) {
  constexpr int kColumns = Tile::kPanel * 8;
#pragma unroll
  for (int column = 0; column < Tile::kColumns; column += kColumns) {
    at.column = column;
    const uint32_t to = tile + Tile::panel_offset(column / 8) + first * Tile::kPitch;
    if constexpr (kBlocks == 1) {
      ptx::copy_box(to, map, barrier, at);
    } else {
      ptx::copy_box_to((1 << kBlocks) - 1, to, map, barrier, at);
    }
  }
}

// Keys and values whose rows lie side by side.
template <class C>
class DenseKeys {
 public:
  static constexpr int kWarps = 1, kLanes = 1;  // that load
  struct Maps {
    CUtensorMap query, key, value;
  };
  static cudaError_t make_maps(Maps& maps, const Problem& p) {
    constexpr int kPanels[] = {C::QTile::kPanel * 8, C::VTile::kPanel * 8};
    const int32_t batch = p.packed() ? 1 : p.batch;
    cudaError_t e = make_tensor_map(maps.query, p, p.query,
                                    {p.head_dim, p.heads, p.q_rows, batch, kPanels[0], kConsumerRows});
    if (e == cudaSuccess)
      e = make_tensor_map(maps.key, p, p.key, {p.head_dim, p.kv_heads, p.k_rows, batch, kPanels[0], C::kN});
    if (e == cudaSuccess)
      e = make_tensor_map(maps.value, p, p.value,
                          {p.value_dim, p.kv_heads, p.k_rows, batch, kPanels[1], C::kN});
    return e;
  }

  __device__ __forceinline__ DenseKeys(const Problem& problem, const Maps& tensor_maps)
      : p(problem), maps(tensor_maps) {}

  __device__ __forceinline__ bool begin(const BlockWork& work, const Interval&) {
    const int32_t kv_head = p.kv_head(work.head);
    key = place(p.key, work, kv_head, work.tile.k_begin);
    value = place(p.value, work, kv_head, work.tile.k_begin);
    return true;
  }
  // The tile's state, by the only thread that reads it.
  template <class R>
  __device__ __forceinline__ void leave(const R& states, uint32_t round) const {
    ptx::barrier_arrive(states.empty_of(round));
  }
  __device__ __forceinline__ void load_key(uint32_t tile, uint32_t barrier, int32_t n) const {
    load<typename C::KTile, kCopiesKeys>(tile, barrier, maps.key, key, n);
  }
  __device__ __forceinline__ void load_value(uint32_t tile, uint32_t barrier, int32_t n) const {
    load<typename C::VTile, kCopiesValues>(tile, barrier, maps.value, value, n);
  }

 private:
  template <class Tile, uint32_t kCopier>
  __device__ __forceinline__ void load(uint32_t tile, uint32_t barrier, const CUtensorMap& map,
                                       ptx::Coordinates at, int32_t n) const {
    at.row += n * C::kN;
    ptx::barrier_expect(barrier, Tile::kBytes);
    if (C::kCluster == 1 || ptx::cluster_rank() == kCopier)
      copy_rows<Tile, C::kCluster>(tile, 0, map, barrier, at);
  }

  const Problem& p;
  const Maps& maps;
  ptx::Coordinates key, value;
};

// The first `Keys::kLanes` of each of `Keys::kWarps` warps, from the team's second warp on.
template <class C, class Keys = typename C::Keys>
struct Loader {
  const Problem& p;
  const typename C::Maps& maps;
  typename C::Shared& shared;
  Keys keys{p, maps.keys};
  uint32_t pair = 0;  // tiles of keys, and of values, so far

  static __device__ __forceinline__ bool leads() { return threadIdx.x % C::kTeamProducers == 32; }

  // Until the stage may be filled, or be expected to be.
  template <uint32_t kCopier, class R>
  static __device__ __forceinline__ void wait(const R& ring, uint32_t use) {
    if (C::kCluster == 1 || ptx::cluster_rank() == kCopier) {
      ring.wait_empty(use);
    } else {
      ring.wait_full_before(use);
    }
  }

  __device__ __forceinline__ void load_key(int32_t n, uint32_t use) {
    wait<kCopiesKeys>(shared.keys, use);
    keys.load_key(ptx::shared_address(shared.k[use % C::kStages]), shared.keys.full_of(use), n);
  }

  __device__ __forceinline__ void load_value(int32_t n, uint32_t use) {
    wait<kCopiesValues>(shared.values, use);
    keys.load_value(ptx::shared_address(shared.v[use % C::kStages]), shared.values.full_of(use), n);
  }

  __device__ __forceinline__ void load_bias(const BlockWork& work, int32_t n, uint32_t use) {
    if constexpr (C::kKind == ScoreKind::kBias) C::Beside::load(shared, maps.beside, p, work, n, use);
  }

  // By the first warp. Q's place is free when the consumer has left it.
  __device__ __forceinline__ void load_query(const BlockWork& work, bool used, int32_t group,
                                             uint32_t round) {
    using Tile = typename C::QTile;
    if (!leads()) return;
    auto& ring = shared.queries[group];
    ring.wait_empty(round);
    const uint32_t full = ring.full_of(round);
    if (!used) return ptx::barrier_arrive(full);
    const int32_t row = work.tile.q_begin + work.tile.row + group * kConsumerRows;
    ptx::barrier_expect(full, Tile::kBytes);
    copy_rows<Tile>(ptx::shared_address(shared.q[group]), 0, maps.keys.query, full,
                    place(p.query, work, work.head, row));
  }

  // In the order of their use: K of a tile before V of the one that comes before it. Who copies nothing into
  // a stage must not wait for it either: it may be filled and left twice before he looks.
  __device__ __forceinline__ void load(const BlockWork& work, const Interval& tiles, uint32_t round) {
    const bool used = !tiles.empty(), copies = used && keys.begin(work, tiles);
    if (copies) load_key(tiles.hi - 1, pair);
    for (int group = 0; group < C::kConsumers; ++group) load_query(work, used, group, round);
    if (used) load_bias(work, tiles.hi - 1, pair);
    for (int32_t n = tiles.hi - 1; n >= tiles.lo; --n, ++pair) {
      if (copies && n > tiles.lo) load_key(n - 1, pair + 1);
      if (copies) load_value(n, pair);
      if (n > tiles.lo) load_bias(work, n - 1, pair + 1);
    }
  }

  __device__ __forceinline__ void run() {
    if (leads()) {
      ptx::prefetch_map(maps.keys.key);
      ptx::prefetch_map(maps.keys.query);
      ptx::prefetch_map(maps.keys.value);
    }
    for (uint32_t round = 0;; ++round) {
      ptx::barrier_wait(shared.states.full_of(round), shared.states.phase(round));
      const auto& tile = shared.tiles[round % C::Shared::kTiles];
      if (leads()) ptx::barrier_arrive(shared.begun.full_of(round));
      load(tile.work, tile.done ? Interval{0, 0} : tile.tiles, round);
      if (tile.done) return;
      keys.leave(shared.states, round);
    }
  }
};

}  // namespace jax_flash
