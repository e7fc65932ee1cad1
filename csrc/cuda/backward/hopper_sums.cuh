// A consumer warpgroup's part of dQ, 64 rows of some columns, on its way to the sums (query_sums.cuh): where
// it belongs, and how it is added, from registers or by TMA from shared memory.
#pragma once

#include "cuda/backward/query_sums.cuh"
#include "cuda/hopper/roles.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/ptx/tma.cuh"

namespace jax_flash {

// Where a consumer's part of dQ lies: each of two consumers has 64 of the rows (of 96 the second has 32), or
// half of the columns.
template <class C>
__device__ __forceinline__ Placement dq_placement(int consumer) {
  if (C::kDqByRows) return {consumer * kConsumerRows, 16, 0, 16};
  return {0, 16, consumer * C::kDqColumns, 16};
}

// Where a warp's rows of its consumer's part lie. With 96 rows some warps have none.
template <class Consumer>
__device__ __forceinline__ Placement dq_of_warp(const Consumer& of) {
  Placement at = dq_placement<typename Consumer::Config>(of.consumer);
  at.row += Consumer::warp_row();
  return at;
}

// The index of a query tile among the sums. `sum`: that index, or its complement if this key tile starts it.
__device__ __forceinline__ int32_t index_of_sum(int32_t sum) { return sum < 0 ? ~sum : sum; }

// Adds a consumer's dQ to the sums. kOrdered: key tiles add in order, and the one that starts a sum stores.
template <bool kOrdered = false, class Consumer>
__device__ __forceinline__ void add_dq(Consumer& of, int32_t sum) {
  using C = typename Consumer::Config;
  const Placement at = dq_of_warp(of);
  if (C::kTakes96Queries && at.row >= C::kM) return;
  float* const to = sum_tile<C::kM>(of.p, of.tile().sums, kOrdered ? index_of_sum(sum) : sum);
  if (kOrdered && sum < 0) return add_to_sums<C::kM, false, true>(to, of.p.head_dim, of.dq, at);
  // One test in place of one for every 8 columns, with a branch and an address each.
  if (at.column + C::kDqColumns <= of.p.head_dim)
    return add_to_sums<C::kM, true>(to, of.p.head_dim, of.dq, at);
  add_to_sums<C::kM>(to, of.p.head_dim, of.dq, at);
}

// Stores a warp's rows, from `row` on, as they lie in the sums.
template <class DQ>
__device__ __forceinline__ void store_part(const DQ& dq, float* part, int row) {
  const uint32_t to = ptx::shared_address(part + sum_offset<kConsumerRows>(0, row, 0) +
                                          static_cast<uint32_t>(ptx::thread_index()) % 32 * 4);
#pragma unroll
  for (int n = 0; n < DQ::kColumnTiles; ++n) {
    const auto& x = dq.x[0][n];
    ptx::store_shared(to + sum_offset<kConsumerRows>(0, 0, n * kSumColumns) * sizeof(float),
                      make_float4(x[0], x[1], x[2], x[3]));
  }
}

// One thread: issues tile += part, as far as it has columns of the head, in a bulk group of its own.
// `stores`: tile = part.
template <int kM, int kColumns>
__device__ __forceinline__ void start_sum_of_part(float* tile, int32_t head_dim, const float* part,
                                                  Placement at, bool stores) {
  const int32_t columns = min(head_dim - at.column, kColumns);
  if (columns > 0) {
    float* const to = tile + sum_offset<kM>(head_dim, at.row, at.column);
    const uint32_t from = ptx::shared_address(part), bytes = columns * kConsumerRows * sizeof(float);
    if (stores) {
      ptx::store_bytes(to, from, bytes);
    } else {
      ptx::reduce_add_floats(to, from, bytes);
    }
  }
  ptx::bulk_commit();
}

}  // namespace jax_flash
