// Shared memory of the portable tangent pass, and the loads of each key tile: K, tK, V and tV.
#pragma once

#include "core/families/portable_layout.h"
#include "core/plan/launch_plan.h"
#include "core/problem.h"
#include "cuda/block_state.cuh"
#include "cuda/gradient.cuh"
#include "cuda/load/dense.cuh"
#include "cuda/load/ring.cuh"

namespace jax_flash::inline JF_ARCH_NAMESPACE {

template <class T, bool kRanges>
struct TangentState : BlockState<T, kRanges> {
  GlobalRows<const T> tquery, key, value, tkey, tvalue;
  GlobalRows<T> tout;
  const float* lse;
  float* tlse;
  int64_t tlse_stride;
  const void* tbias;  // [s_q, s_k] of the CTA's head, or null

  __device__ void prepare(const Problem& p, const Tangents& t, const GridTiles& grid, int32_t block_m,
                          int32_t block_n, int32_t column) {
    BlockState<T, kRanges>::prepare(p, grid, block_m, block_n, column);
    const BlockWork& work = this->work;
    const int32_t head = work.head, kv_head = p.kv_head(head);
    const int32_t q_begin = work.tile.q_begin, k_begin = work.tile.k_begin;
    const auto keys = [&](const View& view, int32_t columns) {
      return GlobalRows<const T>{view.as<const T>() + work.offset(p, view, kv_head, k_begin), view.row,
                                 columns};
    };
    tquery = {t.tquery.as<const T>() + work.offset(p, t.tquery, head, q_begin), t.tquery.row, p.head_dim};
    key = keys(p.key, p.head_dim), tkey = keys(t.tkey, p.head_dim);
    const int32_t columns = p.value_dim - column;
    value = keys(p.value, columns), tvalue = keys(t.tvalue, columns);
    value.data += column, tvalue.data += column;
    tout = {t.tout.as<T>() + work.offset(p, t.tout, head, q_begin) + column, t.tout.row, columns};
    lse = p.lse.as<const float>() + work.offset(p, p.lse, head, q_begin);
    tlse = t.tlse.as<float>() + work.offset(p, t.tlse, head, q_begin), tlse_stride = t.tlse.row;
  }

  template <class Score>
  __device__ void prepare_score(const Problem& p, const Tangents& t) {
    const BlockWork& work = this->work;
    this->score.template prepare<Score>(p, work, work.head);
    tbias = nullptr;
    if (t.tbias && work.tile.index != kNoSequence)
      tbias = t.tbias.as<const uint8_t>() +
              work.offset(p, t.tbias, work.head, 0) * (p.bias_dtype == DType::kF32 ? 4 : 2);
  }
};

// A tile, followed by the tile of its tangent.
template <class Tile_>
struct TilePair {
  using Tile = Tile_;
  static constexpr int kBytes = 2 * Tile::kBytes;
};

// The first pair is K and tK, the second V and tV (a Source of TileRing).
template <class T>
class TangentSource {
 public:
  static constexpr int kAhead = RowSource<T>::kAhead;

  template <class State>
  __device__ __forceinline__ explicit TangentSource(const State& block)
      : primal_(block.key, block.value, block.end), tangent_(block.tkey, block.tvalue, block.end) {}

  template <class Pair, int kThreads>
  __device__ __forceinline__ void load_first(uint32_t shared, int32_t n, int32_t use) {
    using Tile = typename Pair::Tile;
    primal_.template load_first<Tile, kThreads>(shared, n, use);
    tangent_.template load_first<Tile, kThreads>(shared + Tile::kBytes, n, use);
  }
  template <class Pair, int kThreads>
  __device__ __forceinline__ void load_second(uint32_t shared, int32_t n, int32_t use) {
    using Tile = typename Pair::Tile;
    primal_.template load_second<Tile, kThreads>(shared, n, use);
    tangent_.template load_second<Tile, kThreads>(shared + Tile::kBytes, n, use);
  }
  template <class First, class Second, int kThreads, class TileAt>
  __device__ __forceinline__ void start(int32_t use, TileAt tile_at) {
    primal_.template start<typename First::Tile, typename Second::Tile, kThreads>(use, tile_at);
    tangent_.template start<typename First::Tile, typename Second::Tile, kThreads>(use, tile_at);
  }
  template <class Tile>
  __device__ __forceinline__ void skip(int32_t tiles) {
    primal_.template skip<typename Tile::Tile>(tiles);
    tangent_.template skip<typename Tile::Tile>(tiles);
  }
  __device__ __forceinline__ int32_t* numbers() const { return nullptr; }
  __device__ __forceinline__ void look_ahead(int32_t, int32_t) const {}

 private:
  RowSource<T> primal_, tangent_;
};

// The tiles of a key tile, in the order of their use. With stages, K and tK arrive together, and so do V and
// tV.
template <int kStages, int kThreads, class KTile, class VTile, bool kSkips>
class TangentRing {
  using T = typename KTile::Element;
  using Ring = TileRing<kStages, kThreads, TilePair<KTile>, TilePair<VTile>, TangentSource<T>, kSkips>;

 public:
  static constexpr int kBytes = Ring::kBytes;
  static constexpr bool kTogether = true;

  template <class State>
  __device__ __forceinline__ TangentRing(uint32_t shared, const State& block)
      : ring_(shared, TangentSource<T>(block), block.tiles) {}

  template <class From>
  __device__ __forceinline__ void start(int32_t n, From from) {
    ring_.start(n, from);
  }
  __device__ __forceinline__ int32_t next(int32_t n) { return ring_.next(n); }
  template <class From>
  __device__ __forceinline__ uint32_t wait_k(int32_t n, From from) {
    return ring_.wait_first(n, from);
  }
  __device__ __forceinline__ uint32_t wait_v(int32_t n) { return v_ = ring_.wait_second(n); }
  __device__ __forceinline__ uint32_t wait_tv(int32_t) { return v_ + VTile::kBytes; }
  __device__ __forceinline__ void finish() { ring_.finish(); }

 private:
  Ring ring_;
  uint32_t v_;
};

// Without stages the four tiles share one buffer, one after another.
template <int kThreads, class KTile, class VTile, bool kSkips>
class TangentRing<0, kThreads, KTile, VTile, kSkips> {
  using T = typename KTile::Element;
  using Source = RowSource<T>;

 public:
  static constexpr int kBytes = ring_bytes(0, KTile::kBytes, VTile::kBytes);
  static constexpr bool kTogether = false;

  template <class State>
  __device__ __forceinline__ TangentRing(uint32_t shared, const State& block)
      : primal_(shared, Source(block.key, block.value, block.end), block.tiles),
        tangent_(shared, Source(block.tkey, block.tvalue, block.end), block.tiles) {}

  template <class From>
  __device__ __forceinline__ void start(int32_t, From) {}
  __device__ __forceinline__ int32_t next(int32_t n) { return primal_.next(n); }
  template <class From>
  __device__ __forceinline__ uint32_t wait_k(int32_t n, From from) {
    return primal_.wait_first(n, from);
  }
  __device__ __forceinline__ uint32_t wait_tk(int32_t n) {
    return tangent_.wait_first(n, [](int32_t tile) { return tile; });
  }
  __device__ __forceinline__ uint32_t wait_v(int32_t n) { return primal_.wait_second(n); }
  __device__ __forceinline__ uint32_t wait_tv(int32_t n) { return tangent_.wait_second(n); }
  __device__ __forceinline__ void finish() {}

 private:
  TileRing<0, kThreads, KTile, VTile, Source, kSkips> primal_;
  // Each call names the tile that it loads, so this ring does not have to find the next one.
  TileRing<0, kThreads, KTile, VTile, Source> tangent_;
};

// lse and the running r = rowsum(P ∘ dS) of a thread's rows.
//
// In rows of few keys T V and r · O are almost equal, so T's rounding to 16 bits would dominate their
// difference. Therefore V is multiplied by P ∘ (dS − c), where c is the mean of dS, weighted by P, over the
// row's first visible tile. Then only (r − c) · O has to be subtracted.
template <class S>
struct TangentRows {
  float lses[S::kSlots];  // times log2(e); +inf in rows that see no key, so that their P = 0
  float r[S::kSlots];     // this lane's share of r
  float c[S::kSlots];     // in the unit of dS; 0 in rows that have not seen a key yet

  // lse: at the sequence's first row. `row`: the accumulator's first row within the sequence.
  __device__ __forceinline__ TangentRows(const Problem& p, const float* lse, int32_t row, int32_t q_len) {
#pragma unroll
    for (int slot = 0; slot < S::kSlots; ++slot) {
      const int64_t i = row + S::row(slot);
      lses[slot] = row_lse(i < q_len ? lse[i * p.lse.row] : -INFINITY);
      r[slot] = c[slot] = 0;
    }
  }

  // Computes c of the rows whose first visible tile this is: all visible rows if it is the first tile, else
  // those whose band begins here. S holds exponents.
  __device__ __forceinline__ void find_c(const S& s, const S& ds, const Band& band, int32_t row, int32_t key,
                                         bool first) {
#pragma unroll
    for (int slot = 0; slot < S::kSlots; ++slot) {
      const bool begins = first || band.first_key(row + S::row(slot)) >= key;
      if (!__any_sync(~0u, begins)) continue;
      float weight = 0, sum = 0;
#pragma unroll
      for (int n = 0; n < S::kColumnTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float p = ptx::exp2(s.at(slot, n, e));
          weight += p, sum = fmaf(p, ds.at(slot, n, e), sum);
        }
      }
      weight = row_sum(weight), sum = row_sum(sum);
      if (begins && weight > 0) c[slot] = sum / weight;
    }
  }

  __device__ __forceinline__ float lse(int slot) const { return lses[slot]; }
  __device__ __forceinline__ bool sees_nothing(int slot) const { return lses[slot] == INFINITY; }
};

}  // namespace jax_flash::inline JF_ARCH_NAMESPACE
