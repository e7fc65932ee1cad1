// Few query rows against many keys: memory-bound, so each key and value is read once and copies never stop.
//
// A block works on one KV head, whose query heads are rows of the same products. Its warps own rings of their
// own and meet only where a sequence, or the block's part of it, ends. Split keys: Dao et al., Flash-Decoding
// (2023).
#pragma once

#include "cuda/decode/combine.cuh"
#include "cuda/decode/results.cuh"
#include "cuda/decode/ring.cuh"
#include "cuda/decode/rows.cuh"
#include "cuda/decode/schedule.cuh"
#include "cuda/launch.h"
#include "cuda/ptx/shared.cuh"
#include "cuda/registry.h"

namespace jax_flash {
namespace decode::inline JF_FAMILY {

// A row of csrc/kernels.def: M query rows of a KV head, N keys of all warps together. Stored: T, or uint8_t
// for float8, which has as many more stages as it is smaller.
template <class T, class Stored, int HeadDim, int ValueDim, int M, int N, int Stages, int Warps, int Blocks>
struct DecodeSm80 {
  using Element = T;
  static constexpr int kRows = M, kTile = N, kWarps = Warps, kThreads = Warps * 32, kBlocks = Blocks;
  static constexpr int kValueDim = ValueDim;
  using Ring = WarpRing<Stored, HeadDim, ValueDim, Stages * (sizeof(T) / sizeof(Stored)), N>;
  using WarpState = WarpRows<T, Stored, HeadDim, ValueDim, M / 8>;
  using Search = Finder<N, kThreads>;
  static constexpr int kMergeColumns = M == 8 && ValueDim % 64 == 0 ? 64 : 32;  // of O at a time
  static constexpr int kMergePitch = kMergeColumns + 4;
  static constexpr int kRingBytes = Warps * Ring::kBytes;
  static constexpr int kSharedBytes = kRingBytes + Warps * M * (kMergePitch * 4 + sizeof(Softmax));
  static_assert(N == Warps * Ring::kKeys && M % 8 == 0 && ValueDim % kMergeColumns == 0);
};

// float8 is copied and multiplied 64 features at a time.
template <class T, int HeadDim, int ValueDim, int...>
inline constexpr bool takes_float8 = sizeof(T) == 2 && HeadDim % 64 == 0 && ValueDim % 64 == 0;

// The softmax and O of all warps, together, in pieces of a few columns.
template <class C>
class Merge {
 public:
  __device__ __forceinline__ explicit Merge(uint8_t* shared)
      : o_(reinterpret_cast<float*>(shared)),
        softmax_(reinterpret_cast<Softmax*>(o_ + C::kWarps * C::kRows * C::kMergePitch)) {}

  // write(row, feature, O of four columns, its softmax) for every row, by all threads.
  template <class Write>
  __device__ __forceinline__ void run(typename C::WarpState& state, int32_t rows, Write write) {
    publish(state);
    float factor[C::kRows / 8][2];
    C::WarpState::for_each_row([&](int n, int e) {
      factor[n][e] = weight({state.m[n][e], state.l[n][e]}, all_warps(C::WarpState::row_of(n, e)).m);
      if constexpr (C::WarpState::kScaled) factor[n][e] *= state.value_scale;
    });
#pragma unroll 1
    for (int first = 0; first < C::kValueDim; first += C::kMergeColumns) {
#pragma unroll
      for (int i = 0; i < C::kValueDim; i += C::kMergeColumns) {
        if (i == first) put(state, factor, i);  // registers cannot be indexed at run time
      }
      __syncthreads();
      for (int at = static_cast<int>(threadIdx.x); at < rows * (C::kMergeColumns / 4); at += C::kThreads) {
        const int row = at / (C::kMergeColumns / 4), column = at % (C::kMergeColumns / 4) * 4;
        write(row, first + column, sum(row, column), all_warps(row));
      }
      __syncthreads();
    }
  }

 private:
  __device__ __forceinline__ static int warp() { return static_cast<int>(threadIdx.x / 32); }

  // Every lane of a column then has its sum.
  __device__ __forceinline__ void publish(typename C::WarpState& state) {
    C::WarpState::for_each_row([&](int n, int e) {
      state.l[n][e] = column_sum(state.l[n][e]);
      if (threadIdx.x % 32 < 4) {
        softmax_[warp() * C::kRows + C::WarpState::row_of(n, e)] = {state.m[n][e], state.l[n][e]};
      }
    });
    __syncthreads();
  }
  __device__ __forceinline__ Softmax all_warps(int row) const {
    Softmax all{-INFINITY, 0};
    for (int w = 0; w < C::kWarps; ++w) all.m = fmaxf(all.m, softmax_[w * C::kRows + row].m);
    for (int w = 0; w < C::kWarps; ++w) {
      const Softmax part = softmax_[w * C::kRows + row];
      all.l += part.l * weight(part, all.m);
    }
    return all;
  }
  __device__ __forceinline__ void put(const typename C::WarpState& state,
                                      const float (&factor)[C::kRows / 8][2], int first) {
    const int g = static_cast<int>(threadIdx.x % 32 / 4);
    C::WarpState::for_each_row([&](int n, int e) {
      float* row = o_ + (warp() * C::kRows + C::WarpState::row_of(n, e)) * C::kMergePitch;
#pragma unroll
      for (int v = 0; v < C::kMergeColumns / 16; ++v) {
#pragma unroll
        for (int half = 0; half < 2; ++half)
          row[v * 16 + C::WarpState::FragmentsV::feature(g, half)] =
              state.o[n][first / 16 + v][e + 2 * half] * factor[n][e];
      }
    });
  }
  __device__ __forceinline__ float4 sum(int row, int column) const {
    float4 total = make_float4(0, 0, 0, 0);
    for (int w = 0; w < C::kWarps; ++w) {
      const float4 x = *reinterpret_cast<const float4*>(o_ + (w * C::kRows + row) * C::kMergePitch + column);
      total.x += x.x, total.y += x.y, total.z += x.z, total.w += x.w;
    }
    return total;
  }

  float* o_;
  Softmax* softmax_;
};

// The keys of one segment, by this warp and then by all of them together.
template <class C>
__device__ __forceinline__ void attend_segment(const Problem& p, const Rows& rows, const Entry& entry,
                                               Cursor<C::kTile>& cursor, typename C::Ring& ring,
                                               typename C::WarpState& state) {
  constexpr int kKeys = C::Ring::kKeys;
  state.begin(p, rows, entry);
  for (; cursor.tile < cursor.tile_end; ++cursor.tile) {
    const uint32_t k = ring.wait();
    const int32_t key = cursor.tile * C::kTile + static_cast<int>(threadIdx.x) / 32 * kKeys;
    if (key < entry.keys.hi && key + kKeys > entry.keys.lo) {
      state.step(p, rows, entry, key, k, k + C::Ring::KTile::kBytes);
    }
    ring.release();
  }
}

// Nothing to join as yet: of this block's range, or of every sequence where parts are given.
template <class C>
__device__ __forceinline__ void clear_targets(const Call& call, const Rows& rows, int32_t column,
                                              int32_t range, void* workspace) {
  if (call.grid.memory < 0 || (call.grid.fixed_parts() && range > 0)) return;
  const Parts<C::kRows> parts(call.p, call.grid, workspace);
  const int32_t first = call.grid.fixed_parts() ? 0 : range;
  const int32_t last =
      call.grid.fixed_parts() ? static_cast<int32_t>(call.p.leading.count() * call.p.batch) : range + 1;
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < (last - first) * C::kRows; i += C::kThreads) {
    const int32_t index = first + i / C::kRows;
    const int32_t row = i % C::kRows;
    if (call.grid.fixed_parts()) {
      const Entry entry(call, rows, index);
      const bool announced = Tiles<C::kTile>(call.grid, entry).units > 1 && row < rows.end - rows.first &&
                             Target::exists(call.p, rows, entry, row);
      if (announced) continue;  // by the block that has its first part
    }
    parts.targets[parts.row(index, column, row)] = Target{};
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocks)
    decode_sm80(const __grid_constant__ Problem p, const __grid_constant__ DecodeGrid grid, void* workspace,
                const int32_t* starts) {
  using T = typename C::Element;
  __shared__ typename C::Search::Shared found;
  uint8_t* const shared = ptx::dynamic_shared();
  const int32_t column = static_cast<int32_t>(blockIdx.x % grid.columns),
                range = static_cast<int32_t>(blockIdx.x / grid.columns);
  const Call call{p, grid, starts};
  const Rows rows = Rows::of_column<C::kRows>(call, column);
  const typename C::Search search(call, rows, found);
  const Partition& partition = search.partition;
  clear_targets<C>(call, rows, column, range, workspace);
  const int32_t begin = partition.begin(range), end = partition.begin(range + 1);
  if (range >= partition.ranges || begin >= end) return;
  const auto place = search.locate(begin);

  Cursor<C::kTile> cursor{begin, end, place.entry, place.base};
  const uint32_t rings = ptx::shared_address(shared);
  typename C::Ring ring(rings + threadIdx.x / 32 * C::Ring::kBytes, call, rows, cursor);
  Merge<C> merge(shared + C::kRingBytes);
  typename C::WarpState state;
  for (; !cursor.done(); cursor.next()) {
    const Entry entry = cursor.open(call, rows);
    attend_segment<C>(p, rows, entry, cursor, ring, state);
    merge.run(state, rows.end - rows.first, [&](int32_t row, int32_t feature, float4 o, Softmax softmax) {
      if (feature >= p.value_dim || !Target::exists(p, rows, entry, row)) return;
      if (cursor.whole()) return Target(p, rows, entry, row, 0).template store<T>(p, feature, o, softmax);
      const Parts<C::kRows> parts(p, grid, workspace);
      const int64_t at =
          parts.row(slot_of(grid, cursor.entry, cursor.unit - cursor.base, range), column, row);
      *reinterpret_cast<float4*>(parts.o + at * parts.width + feature) = o;
      if (feature > 0) return;
      parts.softmax[at] = softmax;
      if (!cursor.begins_sequence()) return;
      const int32_t index = grid.fixed_parts() ? cursor.entry : range;
      const int32_t count =
          grid.fixed_parts() ? cursor.all : partition.owner(cursor.base + cursor.all - 1) - range + 1;
      parts.targets[parts.row(index, column, row)] = Target(p, rows, entry, row, count);
    });
  }
}

template <class C>
cudaError_t launch(const Problem& p, const LaunchPlan& plan, void* workspace, cudaStream_t stream) {
  const DecodeGrid& grid = plan.decode;
  const int32_t* starts = p.packed() ? query_starts(p, plan.queries, workspace) : nullptr;
  const int64_t blocks = int64_t{grid.columns} * grid.ranges;
  const cudaError_t e = jax_flash::launch(decode_sm80<C>, blocks, C::kThreads, C::kSharedBytes, stream, p,
                                          grid, workspace, starts);
  if (e != cudaSuccess || grid.memory < 0) return e;
  if (const cudaError_t preferred = prefer_shared_memory(combine<C>); preferred != cudaSuccess)
    return preferred;
  const int64_t joined = grid.fixed_parts() ? p.leading.count() * p.batch : grid.ranges;
  return jax_flash::launch(combine<C>, joined * grid.columns, C::kThreads, 0, stream, p, grid, workspace);
}

}  // namespace decode::inline JF_FAMILY

inline namespace JF_FAMILY {

template <class T, int... kNumbers>
cudaError_t launch_decode_sm80(const Problem& p, const LaunchPlan& plan, void* workspace,
                               cudaStream_t stream) {
  if (p.kv_dtype != DType::kF8E4M3)
    return decode::launch<decode::DecodeSm80<T, T, kNumbers...>>(p, plan, workspace, stream);
  if constexpr (decode::takes_float8<T, kNumbers...>) {
    return decode::launch<decode::DecodeSm80<T, uint8_t, kNumbers...>>(p, plan, workspace, stream);
  } else {
    return cudaErrorInvalidValue;  // plan() does not choose it
  }
}

}  // namespace JF_FAMILY
}  // namespace jax_flash

// The launch function of one row and dtype, for csrc/cuda/registry.h.
#define JF_DEFINE_LAUNCH(name, dtype, ...)                                                           \
  namespace jax_flash {                                                                              \
  cudaError_t name(const Problem& p, const LaunchPlan& plan, void* workspace, cudaStream_t stream) { \
    return launch_decode_sm80<dtype, __VA_ARGS__>(p, plan, workspace, stream);                       \
  }                                                                                                  \
  }
