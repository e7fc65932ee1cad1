// Tests of csrc/cuda/tile: the layouts of shared tiles, copies into and out of them, fragments and their
// products.
#include <type_traits>

#include "cuda/tile/accumulator.cuh"
#include "cuda/tile/copy.cuh"
#include "cuda/tile/fragments.cuh"
#include "units.h"

namespace jax_flash::units {
namespace {

// Stores `in` [rows, columns] into a shared tile.
template <class Tile>
__device__ void fill(uint8_t* shared, const float* in) {
  using T = typename Tile::Element;
  for (int i = static_cast<int>(threadIdx.x); i < Tile::kRows * Tile::kColumns; i += 32) {
    const int row = i / Tile::kColumns, column = i % Tile::kColumns;
    const int chunk = Tile::offset(row, column / kChunk<T>);
    reinterpret_cast<T*>(shared + chunk)[column % kChunk<T>] = T(in[i]);
  }
}

template <class Tile>
__device__ float element(const uint8_t* shared, int row, int column) {
  using T = typename Tile::Element;
  const int chunk = Tile::offset(row, column / kChunk<T>);
  return static_cast<float>(reinterpret_cast<const T*>(shared + chunk)[column % kChunk<T>]);
}

template <class S>
__device__ void write(S& s, float* out, int pitch) {
  for_each(s, [&](float x, int slot, int n, int e) { out[S::row(slot) * pitch + S::column(n) + e] = x; });
}

// Writes the offset of every chunk, in chunks.
template <class Tile>
struct Offsets {
  __device__ void operator()(const float*, float* out) const {
    for (int i = 0; i < Tile::kRows * Tile::kChunks; ++i) {
      out[i] = static_cast<float>(Tile::offset(i / Tile::kChunks, i % Tile::kChunks)) / 16;
    }
  }
};

// Loads rows [3, kEnd) of `in`, whose last 8 columns are not used, into a tile, writes the tile, and stores
// it back, with zeros from row kZeros on.
template <class T, int kRows, int kColumns>
struct Copied {
  using Tile = SharedTile<T, kRows, kColumns>;
  static constexpr int kStride = kColumns + 8, kUsed = kColumns - 8, kEnd = kRows - 2, kZeros = kEnd - 5;

  __device__ void operator()(const float* in, float* out) const {
    uint8_t* const shared = ptx::dynamic_shared();
    T* const rows = reinterpret_cast<T*>(out + 2 * kRows * kColumns);
    for (int i = static_cast<int>(threadIdx.x); i < (kEnd + 3) * kStride; i += 128) rows[i] = T(in[i]);
    __syncthreads();
    load_tile<Tile, 128>(ptx::shared_address(shared), GlobalRows<const T>{rows, kStride, kUsed}, 3, kEnd);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < kRows * kColumns; i += 128) {
      out[i] = element<Tile>(shared, i / kColumns, i % kColumns);
    }
    for (int i = static_cast<int>(threadIdx.x); i < (kEnd + 3) * kStride; i += 128) rows[i] = T(7.0f);
    __syncthreads();
    store_tile<Tile, kRows, 128>(shared, 0, GlobalRows<T>{rows, kStride, kUsed}, 3, kZeros, kEnd,
                                 static_cast<int>(threadIdx.x));
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < kRows * kColumns; i += 128) {
      out[kRows * kColumns + i] = static_cast<float>(rows[i / kColumns * kStride + i % kColumns]);
    }
  }
};

template <class T, int kRows, int kColumns>
void test_copy(const std::string& name) {
  using Body = Copied<T, kRows, kColumns>;
  constexpr int kAll = kRows * kColumns;
  const std::vector<float> in = integers((kRows + 3) * Body::kStride);
  std::vector<float> got = run(Body{}, 128, in, 2 * kAll + (kRows + 3) * Body::kStride);
  got.resize(2 * kAll);
  expect("load_tile, store_tile " + name, got, [&](int i) -> double {
    const bool loaded = i < kAll;
    const int row = i % kAll / kColumns, column = i % kColumns;
    const int source = loaded ? row + 3 : row;
    const bool used = column < Body::kUsed && (loaded ? source < Body::kEnd : row >= 3 && row < Body::kEnd);
    if (!used) return loaded ? 0 : 7;
    return loaded || row < Body::kZeros ? in[source * Body::kStride + column] : 0;
  });
}

// Each chunk has an offset of its own.
template <class Tile>
void test_offsets(const std::string& name) {
  std::vector<float> got = run(Offsets<Tile>{}, 1, {}, Tile::kRows * Tile::kChunks);
  std::vector<int> seen(got.size());
  for (float x : got) {
    if (x >= 0 && x < static_cast<float>(seen.size())) ++seen[static_cast<int>(x)];
  }
  expect("SharedTile " + name, std::vector<float>(seen.begin(), seen.end()), [](int) { return 1; });
}

constexpr int kQueries = 32, kKeys = 64, kDepth = 64;

// S [queries, keys] = 2 Q Kᵀ for Q [queries, d] and K [keys, d]. K is in a shared tile, Q in another or in
// registers.
template <class T, bool kPermuted, bool kFromRegisters>
struct Scores {
  using Element = T;
  using Q = SharedTile<T, kQueries, kDepth>;
  using K = SharedTile<T, kKeys, kDepth, kPermuted>;
  using S = std::conditional_t<kPermuted, PermutedAccumulator<2, 8>, Accumulator<2, 8>>;

  __device__ void operator()(const float* in, float* out) const {
    uint8_t *q = ptx::dynamic_shared(), *k = q + Q::kBytes;
    fill<Q>(q, in), fill<K>(k, in + kQueries * kDepth);
    __syncthreads();
    S s;
    const uint32_t q_address = ptx::shared_address(q), k_address = ptx::shared_address(k);
    if constexpr (kFromRegisters) {
      FragmentsA<T, 2, kDepth / kStepK<T>> fragments;
      fragments.read(RowsA<Q>(q_address, 0));
      for (int slot = 0; slot < 4; ++slot) fragments.scale_row(slot, 2.0f);
      s.clear();
      multiply_add<T, kDepth / kStepK<T>>(s, fragments, RowsB<K>(k_address, 0));
    } else {
      mma_qk<Q, K>(s, q_address, 0, k_address);
      for (int slot = 0; slot < S::kSlots; ++slot) s.scale_row(slot, 2.0f);
    }
    write(s, out, kKeys);
  }
};

// O [queries, d] = P [queries, keys] V, P in registers, V [keys, d].
template <class T, bool kPermuted>
struct Values {
  using Element = T;
  using V = SharedTile<T, kKeys, kDepth, kPermuted>;
  using P = std::conditional_t<kPermuted, PermutedAccumulator<2, 8>, Accumulator<2, 8>>;

  __device__ void operator()(const float* in, float* out) const {
    fill<V>(ptx::dynamic_shared(), in + kQueries * kKeys);
    __syncthreads();
    P p;
    for_each(p, [&](float& x, int slot, int n, int e) { x = in[P::row(slot) * kKeys + P::column(n) + e]; });
    Accumulator<2, 8> o;
    o.clear();
    mma_pv<V>(o, p, ptx::shared_address(ptx::dynamic_shared()));
    write(o, out, kDepth);
  }
};

// C [queries, d] = Aᵀ B for A [keys, queries] and B [keys, d] in shared tiles. An accumulator is stored to
// A's tile.
template <class T>
struct Columns {
  using Element = T;
  using A = SharedTile<T, kKeys, kQueries>;
  using B = SharedTile<T, kKeys, kDepth>;

  __device__ void operator()(const float* in, float* out) const {
    uint8_t *a = ptx::dynamic_shared(), *b = a + A::kBytes;
    Accumulator<4, 4> stored;
    for_each(stored, [&](float& x, int slot, int n, int e) {
      x = in[stored.row(slot) * kQueries + stored.column(n) + e];
    });
    store_accumulator<A>(stored, a, {0, 16, 0, 16});
    fill<B>(b, in + kKeys * kQueries);
    __syncthreads();
    Accumulator<2, 8> c;
    c.clear();
    multiply_add<T, kKeys / kStepK<T>>(c, ColumnsA<A, 16>(ptx::shared_address(a), 0),
                                       ColumnsB<B, 16>(ptx::shared_address(b), 0));
    write(c, out, kDepth);
  }
};

// C [queries, d] = A B for A [queries, keys] and B [keys, d] in shared tiles.
template <class T>
struct RowsByColumns {
  using Element = T;
  using A = SharedTile<T, kQueries, kKeys>;
  using B = SharedTile<T, kKeys, kDepth>;

  __device__ void operator()(const float* in, float* out) const {
    uint8_t *a = ptx::dynamic_shared(), *b = a + A::kBytes;
    fill<A>(a, in), fill<B>(b, in + kQueries * kKeys);
    __syncthreads();
    Accumulator<2, 8> c;
    c.clear();
    multiply_add<T, kKeys / kStepK<T>>(c, RowsA<A>(ptx::shared_address(a), 0),
                                       ColumnsB<B, 16, false>(ptx::shared_address(b), 0));
    write(c, out, kDepth);
  }
};

// Σ over k of left[row · left_row + k · left_k] · right[column · right_column + k · right_k].
double product(const float* left, int row, int left_row, int left_k, const float* right, int column,
               int right_column, int right_k, int depth) {
  double sum = 0;
  for (int k = 0; k < depth; ++k) {
    sum +=
        static_cast<double>(left[row * left_row + k * left_k]) * right[column * right_column + k * right_k];
  }
  return sum;
}

template <class T, bool kPermuted>
void test_attention_products(const std::string& name) {
  const std::vector<float> in = integers((kQueries + kKeys) * kDepth);
  const float* keys = in.data() + kQueries * kDepth;
  const auto scores = [&](int i) {
    return 2 * product(in.data(), i / kKeys, kDepth, 1, keys, i % kKeys, kDepth, 1, kDepth);
  };
  expect("mma_qk " + name, run(Scores<T, kPermuted, false>{}, 32, in, kQueries * kKeys), scores);
  expect("FragmentsA " + name, run(Scores<T, kPermuted, true>{}, 32, in, kQueries * kKeys), scores);
  const float* values = in.data() + kQueries * kKeys;
  expect("mma_pv " + name, run(Values<T, kPermuted>{}, 32, in, kQueries * kDepth), [&](int i) {
    return product(in.data(), i / kDepth, kKeys, 1, values, i % kDepth, 1, kDepth, kKeys);
  });
}

template <class T>
void test_dtype(const std::string& name) {
  test_copy<T, 64, 64>(name + " 64 x 64");
  test_copy<T, 32, 96>(name + " 32 x 96");
  test_copy<T, 48, 32>(name + " 48 x 32");
  test_attention_products<T, false>(name);
  if constexpr (sizeof(T) == 2) test_attention_products<T, true>(name + ", permuted");
  const std::vector<float> in = integers((kQueries + kDepth) * kKeys);
  const float* b = in.data() + kQueries * kKeys;
  expect("ColumnsA, ColumnsB, store_accumulator " + name, run(Columns<T>{}, 32, in, kQueries * kDepth),
         [&](int i) { return product(in.data(), i / kDepth, 1, kQueries, b, i % kDepth, 1, kDepth, kKeys); });
  expect("RowsA, ColumnsB " + name, run(RowsByColumns<T>{}, 32, in, kQueries * kDepth),
         [&](int i) { return product(in.data(), i / kDepth, kKeys, 1, b, i % kDepth, 1, kDepth, kKeys); });
}

}  // namespace

void test_tiles() {
  test_offsets<SharedTile<float16, 64, 64>>("16-bit, 64 columns");
  test_offsets<SharedTile<float16, 64, 96>>("16-bit, 96 columns");
  test_offsets<SharedTile<float16, 32, 160>>("16-bit, 160 columns");
  test_offsets<GroupedTile<float16, 64, 128>>("16-bit, 128 columns, grouped");
  test_offsets<SharedTile<float16, 64, 128, true>>("16-bit, 128 columns, permuted");
  test_offsets<SharedTile<float, 32, 96>>("float32, 96 columns");
  test_dtype<float16>("float16");
  if (has_bfloat16()) test_dtype<bfloat16>("bfloat16");
  test_dtype<float>("float32");
}

}  // namespace jax_flash::units
