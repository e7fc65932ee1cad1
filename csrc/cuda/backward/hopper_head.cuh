// dQ of short calls: the CTAs of all key tiles of a KV head form a cluster. They clear the head's sums, add
// to them, and round them, so that no other kernel has to. Every thread takes part in both cluster barriers.
#pragma once

#include <cstdint>

#include "cuda/backward/query_sums.cuh"
#include "cuda/hopper/roles.cuh"
#include "cuda/ptx/cluster.cuh"

namespace jax_flash {

template <class C>
struct HeadSums {
  const Problem& p;
  const QuerySums& sums;

  // The cluster's number: that of its leading and batch entry and KV head.
  __device__ __forceinline__ static uint32_t cluster() { return blockIdx.x / ptx::cluster_ctas(); }
  // Query tiles of all heads of the group, whose sums are contiguous.
  __device__ __forceinline__ int32_t tiles() const { return p.heads / p.kv_heads * sums.tiles; }
  __device__ __forceinline__ int64_t tile_floats() const { return int64_t{C::kM} * p.head_dim; }
  __device__ __forceinline__ float* data() const { return sums.data + cluster() * tiles() * tile_floats(); }

  // All threads: clears this CTA's share.
  __device__ __forceinline__ void clear() const {
    auto* const to = reinterpret_cast<float4*>(data());
    const int64_t count = tiles() * tile_floats() / 4, step = int64_t{ptx::cluster_ctas()} * C::kThreads;
    for (int64_t i = int64_t{ptx::cluster_rank()} * C::kThreads + threadIdx.x; i < count; i += step)
      to[i] = float4{};
    ptx::release_to_cluster();
  }

  // Consumers: rounds this CTA's share to dQ.
  __device__ __forceinline__ void round() const {
    using T = typename C::Element;
    const auto entry = static_cast<int32_t>(cluster() / p.kv_heads);
    const int32_t head = static_cast<int32_t>(cluster() % p.kv_heads) * (p.heads / p.kv_heads);
    SumRows<T> rows{p.dquery.as<T>() + int64_t{entry} * p.q_rows * p.heads * p.head_dim, 0, 0, p.q_rows, 0};
    rows.used = fixed_sequence(p, entry / p.batch, entry % p.batch).q_len;
    const float* const from = data();
    for (auto i = static_cast<int32_t>(ptx::cluster_rank()); i < tiles();
         i += static_cast<int32_t>(ptx::cluster_ctas())) {
      rows.first = int64_t{i % sums.tiles} * C::kM, rows.head = head + i / sums.tiles;
      round_tile<T, C::kM>(p, from + i * tile_floats(), rows, ptx::thread_index() - kWarpgroup,
                           C::kConsumers * kWarpgroup);
    }
  }
};

}  // namespace jax_flash
