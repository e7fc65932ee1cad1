// The forward over pages for sm_90a: the loop of cuda/forward/sm90.cuh, its keys and values gathered through
// the block table, box by box.
#pragma once

#include <numeric>

#include "core/paging.h"
#include "cuda/forward/sm90.cuh"

namespace jax_flash {

// Rows of NaN, one 16 bytes after the other: what keys outside the pool are.
inline constexpr int kNanRows = 128, kNanStep = 8;
struct NanRows {
  uint16_t x[kNanRows * kNanStep + 256];
  constexpr NanRows() : x() {
    for (uint16_t& e : x) e = 0x7FFF;
  }
};
static __device__ const NanRows kNan{};

// A box: rows that neither a page nor a tile cuts. Every lane finds one box of a tile, a tile ahead; the
// first lane has all of them copied.
template <class C>
class PagedKeys {
 public:
  static constexpr int kWarps = 3, kLanes = 32;
  static constexpr int kAtom = 8;  // rows that the swizzle repeats after: boxes have a multiple of them
  static_assert(C::kN / kAtom <= kLanes && C::kN <= kNanRows);
  struct Maps {
    CUtensorMap query, key, value, missing;
    int32_t box;
  };
  static cudaError_t make_maps(Maps& maps, const Problem& p) {
    constexpr int kPanels[] = {C::QTile::kPanel * 8, C::VTile::kPanel * 8};
    maps.box = std::gcd(p.page_size, C::kN);
    View nan{};
    nan.row = kNanStep;
    cudaError_t e = cudaGetSymbolAddress(&nan.data, kNan);
    const auto make = [&](CUtensorMap& map, const View& view, const MapShape& shape) {
      if (e == cudaSuccess) e = make_tensor_map(map, p, view, shape);
    };
    make(maps.query, p.query,
         {p.head_dim, p.heads, p.q_rows, p.packed() ? 1 : p.batch, kPanels[0], kConsumerRows});
    make(maps.key, p.key, {p.head_dim, p.kv_heads, p.page_size, p.pages, kPanels[0], maps.box});
    make(maps.value, p.value, {p.value_dim, p.kv_heads, p.page_size, p.pages, kPanels[1], maps.box});
    make(maps.missing, nan, {p.head_dim, 1, maps.box, 1, kPanels[0], maps.box});
    return e;
  }

  __device__ __forceinline__ PagedKeys(const Problem& problem, const Maps& tensor_maps)
      : p(problem), maps(tensor_maps) {}

  // False: no box is this lane's.
  __device__ __forceinline__ bool begin(const BlockWork& of_tile, const Interval& tiles) {
    if (row() >= C::kN) return false;
    work = &of_tile;
    entries =
        page_table(p.block_tables, p.leading, work->leading, work->tile.index, p.page_size, p.pages).entries;
    head = p.kv_head(work->head);
    value = next = find(tiles.hi - 1);
    return true;
  }
  template <class R>
  __device__ __forceinline__ void leave(const R& states, uint32_t round) const {
    states.leave(round);
  }

  __device__ __forceinline__ void load_key(uint32_t tile, uint32_t barrier, int32_t n) {
    key = next;
    next = find(n - 1);
    load<typename C::KTile, true>(tile, barrier, maps.key, p.key, key);
  }
  // Of the tile after the last one of values.
  __device__ __forceinline__ void load_value(uint32_t tile, uint32_t barrier, int32_t) {
    load<typename C::VTile, false>(tile, barrier, maps.value, p.value, value);
    value = key;
  }

 private:
  static constexpr int32_t kMissing = -1;  // in the place of a page: outside the pool

  // The first row of this lane's box: neighbours are copied by different warps.
  __device__ __forceinline__ int32_t row() const {
    const int32_t thread = static_cast<int32_t>(threadIdx.x), warp = thread / 32 - 1;
    return (warp + thread % 32 * kWarps) * maps.box;
  }

  // This lane's box of tile n. What lies past the keys is in a page that the copy engine finds empty.
  __device__ __forceinline__ PageSlot find(int32_t n) const {
    const int32_t position = n * C::kN + row();
    if (n < 0 || position >= work->tile.k_len) return {p.pages, 0};
    const PageTable table{entries, p.page_size, p.pages};
    const PageSlot found = table.at(position);
    return table.in_pool(found.page) ? found : PageSlot{kMissing, 0};
  }

  template <class Tile, bool kNanIfMissing>
  __device__ __forceinline__ void load(uint32_t tile, uint32_t barrier, const CUtensorMap& map,
                                       const View& view, PageSlot slot) const {
    if (threadIdx.x == 32) ptx::barrier_expect(barrier, Tile::kBytes);
    if (kNanIfMissing && slot.page == kMissing) {
      copy_rows<Tile>(tile, row(), maps.missing, barrier, {});
    } else {
      const int32_t page = slot.page == kMissing ? p.pages : slot.page;
      const int32_t leading = view.leading[0] ? static_cast<int32_t>(work->leading) : 0;
      copy_rows<Tile>(tile, row(), map, barrier, {0, head, slot.slot, page, leading});
    }
  }

  const Problem& p;
  const Maps& maps;
  const BlockWork* work;
  const int32_t* entries;  // of the block table
  int32_t head;
  PageSlot value, key, next;  // boxes: of the next tile of values, the last of keys and the next
};

}  // namespace jax_flash

#undef JF_LAUNCH_FORWARD
#undef JF_DEFINE_LAUNCH
#define JF_LAUNCH_FORWARD(kind, dtype, ...) \
  launch_forward_sm90<ForwardSm90<dtype, __VA_ARGS__, ScoreKind::kind, PagedKeys>>(p, plan, workspace, stream)
#define JF_DEFINE_LAUNCH(name, dtype, ...)                                                           \
  namespace jax_flash {                                                                              \
  cudaError_t name(const Problem& p, const LaunchPlan& plan, void* workspace, cudaStream_t stream) { \
    using Plain = ForwardSm90<dtype, __VA_ARGS__, ScoreKind::kPlain>;                                \
    switch (plan.score) {                                                                            \
      JF_CASE(kPlain, dtype, __VA_ARGS__)                                                            \
      JF_CASE(kGeneral, dtype, __VA_ARGS__)                                                          \
      default:                                                                                       \
        break;                                                                                       \
    }                                                                                                \
    return cudaErrorNotSupported;                                                                    \
  }                                                                                                  \
  }
