// The loader of keys and values in the pages of a pool, for the sm_90a kernels; see load/hopper_dense.cuh.
//
// A tile is loaded in boxes of rows that lie in one page and in one tile. One warp loads K and another one V,
// so that neither waits for the other's stages. Each lane looks up the page of one box, and together they
// look up those of as many tiles as have 32 boxes, while the tiles before are loaded: while memory is busy, a
// lookup takes as long as the load of a small tile.
#pragma once

#include <cstdint>
#include <numeric>

#include "core/divisor.h"
#include "cuda/hopper/tma.cuh"
#include "cuda/load/page_scales.cuh"

namespace jax_flash {

// Keys whose page lies outside the pool are loaded from here: overlapping rows of NaN in every dtype, 16
// bytes apart.
inline constexpr int kNanRows = 128;
struct NanRows {
  uint16_t x[kNanRows * kChunk<uint16_t> + 2 * kMaxHeadDim];
  constexpr NanRows() : x() {
    for (uint16_t& e : x) e = 0x7FFF;
  }
};
static __device__ const NanRows kNan{};

// The rows of a page from `slot` on, at one head of its leading entry, and their columns from `column` on.
struct PageRows {
  int32_t head, slot, page, leading, column;
};

// Loads one box per panel of a tile, which works for every layout and head dim.
struct PanelBoxes {
  using Map = CUtensorMap;

  template <class Tile>
  static cudaError_t make(Map& map, const Problem& p, const View& view, int32_t columns, int32_t rows) {
    constexpr int32_t kBytes = sizeof(typename Tile::Element), kPanel = Tile::kPanel * 16 / kBytes;
    return make_tensor_map(map, p, view,
                           {columns, p.kv_heads, p.page_size, p.pages, kPanel, rows, 1, kBytes});
  }
  template <class Tile>
  __device__ __forceinline__ static void load(uint32_t tile, int32_t first, const Map& map, uint32_t barrier,
                                              const PageRows& at) {
    load_rows<Tile>(tile, first, map, barrier, {at.column, at.head, at.slot, at.page, at.leading});
  }
};

// Loads one box with all panels into a GroupedTile, if has_page_map(), in kernels without slices.
struct WholeRowBoxes {
  using Map = PageMap;

  template <class Tile>
  static cudaError_t make(Map& map, const Problem& p, const View& view, int32_t columns, int32_t rows) {
    return make_page_map(map, p, view, columns, rows);
  }
  template <class Tile>
  __device__ __forceinline__ static void load(uint32_t tile, int32_t first, const Map& map, uint32_t barrier,
                                              const PageRows& at) {
    const int32_t group = at.page * map.page_groups + at.head * map.head_groups + at.slot / 8;
    ptx::copy_box(tile + first / 8 * Tile::kGroup, map, barrier,
                  {0, 0, at.head * map.head_panels, group, at.leading});
  }
};

template <class C, class Boxes, class KTile = typename C::KTile, class VTile = typename C::VTile>
class PageLoader {
 public:
  using Element = typename KTile::Element;
  static constexpr int kWarps = 2, kLanes = 32;
  static constexpr int kAtom = 8;  // rows of the swizzle's pattern, whose multiples boxes have
  static_assert(C::kN / kAtom <= kLanes && C::kN <= kNanRows && C::kTeams == 1);
  struct Maps {
    typename Boxes::Map key, value, missing;
    int32_t box, boxes;  // rows of a box, boxes of a tile
    int32_t tiles;       // tiles of which a warp looks up the pages at once
    Divisor page_size, group;
  };
  static cudaError_t make_maps(Maps& maps, const Problem& p) {
    maps.box = std::gcd(p.page_size, C::kN), maps.boxes = C::kN / maps.box;
    maps.tiles = kLanes / maps.boxes;
    maps.page_size = Divisor(p.page_size), maps.group = Divisor(p.heads / p.kv_heads);
    Problem missing = p;  // a page of NaN
    missing.kv_heads = missing.pages = 1, missing.page_size = maps.box;
    View nan{};
    nan.row = kChunk<Element>, nan.batch = nan.row * maps.box;
    cudaError_t e = cudaGetSymbolAddress(&nan.data, kNan);
    const auto make = [&]<class Tile>(auto& map, const Problem& problem, const View& view, int32_t columns) {
      if (e == cudaSuccess) e = Boxes::template make<Tile>(map, problem, view, columns, maps.box);
    };
    make.template operator()<KTile>(maps.key, p, p.key, p.head_dim);
    make.template operator()<VTile>(maps.value, p, p.value, p.value_dim);
    make.template operator()<KTile>(maps.missing, missing, nan, p.head_dim);
    return e;
  }

  __device__ __forceinline__ explicit PageLoader(const Problem& problem) : p(problem) {}

  template <class TileOf>
  __device__ __forceinline__ void begin(const Maps& maps, const BlockWork& of_tile, int32_t first,
                                        TileOf tile_of) {
    work = &of_tile;
    const View& tables = p.block_tables;  // there is at most one leading dimension
    entries =
        tables.as<const int32_t>() + work->leading * tables.leading[0] + work->tile.index * tables.batch;
    const auto lane = static_cast<int32_t>(threadIdx.x % 32);
    own_tile = lane / maps.boxes, own_box = lane % maps.boxes;
    next_first = first;
    find(maps, tile_of(first - own_tile));
    head = maps.group.quotient(work->head);
  }
  __device__ __forceinline__ void begin_columns(int32_t column) { first_column = column; }
  template <class Pipe>
  __device__ __forceinline__ void release(const Pipe& state, uint32_t use) const {
    state.release(use);
  }

  // Keys on a page outside the pool become NaN. Values there, and rows past the keys, become zeros: TMA fills
  // a page behind the pool with zeros.
  template <class TileOf>
  __device__ __forceinline__ void look_up(const Maps& maps, int32_t n, TileOf tile_of) {
    if (n == next_first) {
      const bool in_pool = 0 <= next_page && next_page < p.pages, used = next_slot != kNoSlot && in_pool;
      missing = next_slot != kNoSlot && !in_pool;
      page = used ? next_page : p.pages, slot = used ? next_slot : 0;
      next_first -= maps.tiles;
      find(maps, tile_of(next_first - own_tile));
    }
    loads = own_tile == next_first + maps.tiles - n;
  }
  __device__ __forceinline__ void load_key(const Maps& maps, uint32_t tile, uint32_t barrier, int32_t,
                                           int part, uint32_t) const {
    load<KTile, true>(maps, tile, barrier, maps.key, p.key, part * KTile::kColumns);
  }
  __device__ __forceinline__ void load_value(const Maps& maps, uint32_t tile, uint32_t barrier,
                                             int32_t) const {
    load<VTile, false>(maps, tile, barrier, maps.value, p.value, C::kHasColumns ? first_column : 0);
  }

 protected:
  // Looks up this lane's box of tile n. Nothing waits for its page before look_up() takes it.
  __device__ __forceinline__ void find(const Maps& maps, int32_t n) {
    const int32_t position = n * C::kN + own_box * maps.box;
    next_slot = kNoSlot;
    if (own_tile >= maps.tiles || position < 0 || position >= work->tile.k_len) return;
    const int32_t entry = maps.page_size.quotient(position);
    next_page = entries[entry], next_slot = position - entry * p.page_size;
  }

  template <class Tile, bool kNanIfMissing>
  __device__ __forceinline__ void load(const Maps& maps, uint32_t tile, uint32_t barrier,
                                       const typename Boxes::Map& map, const View& view,
                                       int32_t column) const {
    const auto lane = static_cast<int32_t>(threadIdx.x % 32);
    __syncwarp();  // every lane must see the stage empty before it is filled and released again
    if (lane == 0) ptx::barrier_expect(barrier, Tile::kBytes);
    if (!loads) return;
    if (kNanIfMissing && missing) {
      Boxes::template load<Tile>(tile, own_box * maps.box, maps.missing, barrier, {});
    } else {
      const int32_t leading = view.leading[0] ? static_cast<int32_t>(work->leading) : 0;
      Boxes::template load<Tile>(tile, own_box * maps.box, map, barrier, {head, slot, page, leading, column});
    }
  }

  static constexpr int32_t kNoSlot = -1;  // stands for a box past the keys
  const Problem& p;
  const BlockWork* work;
  const int32_t* entries;     // of the block table's row
  int32_t head;               // of K and V
  int32_t first_column = 0;   // of V
  int32_t own_tile, own_box;  // this lane's box: of which tile of those that are looked up at once, and which
  int32_t page, slot;         // where it lies
  bool missing;               // its page lies outside the pool
  bool loads = false;         // whether its tile is the one that is loaded now
  int32_t next_page = 0, next_slot;  // the same for the following tiles
  int32_t next_first;                // the number of the first of these
};

template <class C>
struct PagedLoader : PageLoader<C, PanelBoxes> {
  using PageLoader<C, PanelBoxes>::PageLoader;
};
template <class C>
struct PagedRowsLoader : PageLoader<C, WholeRowBoxes> {
  using PageLoader<C, WholeRowBoxes>::PageLoader;
};

// Tiles of a float8 pool, as they are stored, with the scales of their pages.
template <class C>
class Float8PagesLoader
    : public PageLoader<C, PanelBoxes, typename C::Stored::KTile, typename C::Stored::VTile> {
  using Base = PageLoader<C, PanelBoxes, typename C::Stored::KTile, typename C::Stored::VTile>;

 public:
  using Base::Base;
  using typename Base::Maps;

  // `scales`: of the pool that this warp loads.
  template <class TileOf>
  __device__ __forceinline__ void look_up(const Maps& maps, int32_t n, TileOf tile_of, const View& scales) {
    const bool takes = n == this->next_first;
    Base::look_up(maps, n, tile_of);
    if (!takes) return;
    scale = this->page < this->p.pages
                ? scale_of_page(this->p, scales, this->work->leading, this->head, this->page)
                : 1;
  }
  // Writes the scales of the tile's groups of rows, before load_key() or load_value().
  __device__ __forceinline__ void share_scales(const Maps& maps, float* groups) const {
    if (!this->loads) return;
    for (int32_t i = 0; i < maps.box / kScaledRows; ++i)
      groups[this->own_box * maps.box / kScaledRows + i] = scale;
  }

 private:
  float scale;
};

// Whether a kernel's loader reads pages; whether they are float8; whether its tiles are GroupedTile.
template <template <class> class Loader>
inline constexpr bool kInPages = false;
template <>
inline constexpr bool kInPages<PagedLoader> = true;
template <>
inline constexpr bool kInPages<PagedRowsLoader> = true;
template <>
inline constexpr bool kInPages<Float8PagesLoader> = true;
template <template <class> class Loader>
inline constexpr bool kFloat8Pages = false;
template <>
inline constexpr bool kFloat8Pages<Float8PagesLoader> = true;
template <template <class> class Loader>
inline constexpr bool kGroupsRows = false;
template <>
inline constexpr bool kGroupsRows<PagedRowsLoader> = true;

}  // namespace jax_flash
