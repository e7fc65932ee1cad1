// The varlen schedule: which tile of which sequence every slot is, from cu_seqlens, on the device.
//
// Sequence z of the padded list (the tokens before the first sequence, the n sequences, the tokens after the
// last) owns the slots from first_slot(start(z)) up to its successor's: no prefix sum over tiles is needed,
// and every tile of every sequence has a slot. The slots left over have no rows.
#include "core/sequence.h"
#include "cuda/launch.h"
#include "cuda/registry.h"
#include "cuda/work.cuh"

namespace jax_flash {
namespace {

constexpr int kThreads = 512;

// starts[i] = running maximum of cu_seqlens [n + 1], clamped to [0, rows].
__device__ void running_maximum(const View& cu_seqlens, int64_t offset, int32_t n, int32_t rows,
                                int32_t* starts) {
  __shared__ int32_t scan[kThreads];
  int32_t carry = 0;
  const int32_t* source = cu_seqlens.as<const int32_t>() + offset;
  for (int64_t base = 0; base <= n; base += kThreads) {
    const int64_t i = base + threadIdx.x;
    scan[threadIdx.x] = max(carry, i <= n ? clamp_index(source[i * cu_seqlens.batch], rows) : 0);
    __syncthreads();
    for (int step = 1; step < kThreads; step *= 2) {
      const int32_t before = static_cast<int>(threadIdx.x) >= step ? scan[threadIdx.x - step] : 0;
      __syncthreads();
      scan[threadIdx.x] = max(scan[threadIdx.x], before);
      __syncthreads();
    }
    if (i <= n) starts[i] = scan[threadIdx.x];
    carry = scan[kThreads - 1];
    __syncthreads();
  }
}

// padded [n + 3]: where the tokens before, the sequences and the tokens after them begin, of the rows that
// the tiles are of; others [n + 1]: where the sequences' other rows begin.
template <Over over>
__device__ TileWork tile_of_slot(const Problem& p, int64_t leading, const int32_t* padded,
                                 const int32_t* others, int32_t block, int64_t slot,
                                 const DecodeGrid& decode) {
  constexpr bool kQueries = over == Over::kQueries;
  const int32_t z = sequence_of_slot(padded, p.batch + 2, block, slot);
  const int64_t row = (slot - first_slot(padded[z], block, z)) * block;
  const int32_t rows = padded[z + 1] - padded[z];
  if (row >= rows) return TileWork{};
  const int32_t begin = static_cast<int32_t>(row), end = begin + min(block, rows - begin);
  if (z == 0 || z == p.batch + 1) {
    return {-1, kQueries ? padded[z] : 0, kQueries ? 0 : padded[z], 0, 0, begin, end, 0};
  }
  const int32_t* starts = padded + 1;
  const Sequence s =
      p.paged() ? paged_sequence(p, leading, z - 1, starts)
                : varlen_sequence(p, leading, z - 1, kQueries ? starts : others, kQueries ? others : starts);
  if (decode.takes(s.q_len, p.heads / p.kv_heads)) return TileWork{};
  return {s.index, s.q_begin, s.k_begin, s.q_len, s.k_len, begin, end, 0};
}

// One block per leading entry.
template <Over over>
__global__ void __launch_bounds__(kThreads)
    build_schedule(const __grid_constant__ Problem p, TileWork* schedule, int32_t* starts, int64_t tiles,
                   int32_t block, const __grid_constant__ DecodeGrid decode) {
  const int64_t leading = blockIdx.x;
  const int32_t n = p.batch;
  int32_t* padded = starts + leading * 2 * (n + 2);
  int32_t* others = padded + n + 3;
  int32_t* q_starts = over == Over::kQueries ? padded + 1 : others;
  int32_t* k_starts = over == Over::kQueries ? others : padded + 1;
  const View &q = p.cu_seqlens_q, &k = p.cu_seqlens_k;
  running_maximum(q, q.leading_offset(p.leading, leading), n, p.q_rows, q_starts);
  if (!p.paged()) running_maximum(k, k.leading_offset(p.leading, leading), n, p.k_rows, k_starts);
  if (threadIdx.x == 0) padded[0] = 0, padded[n + 2] = over == Over::kQueries ? p.q_rows : p.k_rows;
  __syncthreads();
  for (int64_t slot = threadIdx.x; slot < tiles; slot += kThreads) {
    schedule[leading * tiles + slot] = tile_of_slot<over>(p, leading, padded, others, block, slot, decode);
  }
}

template <Over over>
cudaError_t launch_schedule(const Problem& p, const LaunchPlan& plan, const TileGrid& grid, void* workspace,
                            cudaStream_t stream) {
  if (grid.schedule < 0) return cudaSuccess;
  const int64_t leading = p.leading.count();
  auto* schedule = reinterpret_cast<TileWork*>(static_cast<char*>(workspace) + grid.schedule);
  auto* starts = reinterpret_cast<int32_t*>(schedule + leading * grid.tiles);
  return launch(build_schedule<over>, leading, kThreads, 0, stream, p, schedule, starts, grid.tiles,
                grid.block, plan.decode);
}

}  // namespace

cudaError_t launch_schedules(const Problem& p, const LaunchPlan& plan, void* workspace, cudaStream_t stream) {
  const cudaError_t e = launch_schedule<Over::kQueries>(p, plan, plan.queries, workspace, stream);
  if (e != cudaSuccess) return e;
  return launch_schedule<Over::kKeys>(p, plan, plan.keys, workspace, stream);
}

}  // namespace jax_flash
