// The shared memory of the portable kernels (archs sm75 and sm80), for host and device. A layout has a
// kernel's offsets and dynamic size; the plan calls the *_shared_bytes functions, which include static shared
// memory.
//
// Offsets and sizes are in bytes. Tiles are dense: a swizzle permutes chunks within a tile and pads nothing.
#pragma once

#include <cstdint>

#include "core/plan/row.h"

namespace jax_flash {

// Upper bound of a kernel's static shared memory without the page loader's addresses: its block state and
// barriers.
inline constexpr int64_t kBlockStateBytes = 512;

constexpr int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }

// A ring of tile pairs. Without stages both tiles of a pair share one buffer.
constexpr int32_t ring_bytes(int32_t stages, int32_t first, int32_t second) {
  return stages == 0 ? larger(first, second) : stages * (first + second);
}

inline constexpr int32_t kKeyAddressBytes = 16;  // of one key's row and its value's row in global memory

// The page loader's row addresses, of the tiles in the ring and of the next tile.
constexpr int32_t page_address_bytes(int32_t block_n, int32_t stages) {
  return (stages + 1) * block_n * kKeyAddressBytes;
}

struct ForwardLayout {
  int32_t q;     // Q [M, d]; O [M, dv] at the end
  int32_t ring;  // K [N, d] and V [N, dv], of a slice's columns
  int32_t bytes;
};

constexpr ForwardLayout forward_layout(const Row& r, int32_t element_size) {
  const int32_t q_bytes = r.block_m * r.head_dim * element_size;
  const int32_t k_bytes = r.block_n * r.head_dim * element_size;
  const int32_t v_bytes = r.block_n * r.slice_columns() * element_size;
  return {0, q_bytes, q_bytes + ring_bytes(r.stages, k_bytes, v_bytes)};
}

// The block state of the forward, which is static shared memory; with pages it includes the row addresses.
constexpr int64_t forward_state_bytes(const Row& r, bool paged) {
  return kBlockStateBytes + (paged ? page_address_bytes(r.block_n, r.stages) : 0);
}

// All shared memory of a thread block: dynamic and static.
constexpr int64_t forward_shared_bytes(const Row& r, int32_t element_size, bool paged) {
  return forward_layout(r, element_size).bytes + forward_state_bytes(r, paged);
}

// The backward's kernel over key tiles.
struct BackwardLayout {
  int32_t k, v;     // K [N, d] and V [N, dv]; dK and dV at the end
  int32_t queries;  // the stages, each of stage_bytes and with Q [M, d] at offset 0
  int32_t stage_bytes;
  int32_t d_out;       // offset in a stage of dO [M, dv]; 0 if Q and dO share one buffer
  int32_t lse, delta;  // offsets in a stage of lse and delta [M] float32
  int32_t p, ds;       // P and dS [M, N]
  int32_t barriers;    // P and dS full, P and dS empty, and one for each stage
  int32_t bytes;
};

inline constexpr int32_t kMbarrierBytes = 8;

constexpr BackwardLayout backward_layout(const Row& r, int32_t element_size) {
  const int32_t q_bytes = r.block_m * r.head_dim * element_size;
  const int32_t d_out_bytes = r.block_m * r.value_dim * element_size;
  const int32_t p_bytes = r.block_m * r.block_n * element_size;
  const int32_t row_bytes = r.block_m * int32_t{sizeof(float)};
  BackwardLayout at{};
  at.v = r.block_n * r.head_dim * element_size;
  at.queries = at.v + r.block_n * r.value_dim * element_size;
  const bool single_buffer = r.stages == 0;
  at.d_out = single_buffer ? 0 : q_bytes;
  at.lse = single_buffer ? larger(q_bytes, d_out_bytes) : q_bytes + d_out_bytes;
  at.delta = at.lse + row_bytes;
  at.stage_bytes = at.delta + row_bytes;
  at.p = at.queries + larger(r.stages, 1) * at.stage_bytes;
  at.ds = at.p + p_bytes;
  at.barriers = at.ds + p_bytes;
  at.bytes = at.barriers + (2 + r.stages) * kMbarrierBytes;
  return at;
}

// The barriers are counted in kBlockStateBytes.
constexpr int64_t backward_shared_bytes(const Row& r, int32_t element_size) {
  return backward_layout(r, element_size).barriers + kBlockStateBytes;
}

// The backward's kernel over query tiles, which needs less memory than the same row's kernel over key tiles.
struct BackwardQueriesLayout {
  int32_t q, d_out;  // Q [M, d] and dO [M, dv]; dQ [M, d] at the end
  int32_t ring;      // V [N, dv] and K [N, d], one stage or none
  int32_t bytes;
};

constexpr BackwardQueriesLayout backward_queries_layout(const Row& r, int32_t element_size) {
  const int32_t ring = r.block_m * (r.head_dim + r.value_dim) * element_size;
  const int32_t k_bytes = r.block_n * r.head_dim * element_size;
  const int32_t v_bytes = r.block_n * r.value_dim * element_size;
  return {0, r.block_m * r.head_dim * element_size, ring,
          ring + ring_bytes(r.stages == 0 ? 0 : 1, v_bytes, k_bytes)};
}

// The tangent pass. Each tile is paired with the tile of its tangent.
struct TangentLayout {
  int32_t q, tq;  // Q and tQ [M, d]; tO [M, dv] at the end
  int32_t ring;   // K and tK [N, d], V and tV [N, dv]
  int32_t bytes;
};

// Without stages the four tiles share one buffer.
constexpr TangentLayout tangent_layout(const Row& r, int32_t element_size) {
  const int32_t q_bytes = r.block_m * r.head_dim * element_size;
  const int32_t k_bytes = r.block_n * r.head_dim * element_size;
  const int32_t v_bytes = r.block_n * r.slice_columns() * element_size;
  const int32_t ring = r.stages == 0 ? larger(k_bytes, v_bytes) : r.stages * 2 * (k_bytes + v_bytes);
  return {0, q_bytes, 2 * q_bytes, 2 * q_bytes + ring};
}

constexpr int64_t tangent_shared_bytes(const Row& r, int32_t element_size) {
  return tangent_layout(r, element_size).bytes + kBlockStateBytes;
}

struct BiasGradientLayout {
  int32_t q, k, d_out, v;  // [M, d], [N, d], [M, dv], [N, dv]; without a stage dO and V replace Q and K
  int32_t sum;             // the sum of dS [M, N] float32, at the end
  int32_t bytes;
};

constexpr BiasGradientLayout bias_gradient_layout(const Row& r, int32_t element_size) {
  const int32_t qk_bytes = (r.block_m + r.block_n) * r.head_dim * element_size;
  const int32_t dov_bytes = (r.block_m + r.block_n) * r.value_dim * element_size;
  const int32_t d_out = r.stages == 0 ? 0 : qk_bytes;
  BiasGradientLayout at{};
  at.k = r.block_m * r.head_dim * element_size;
  at.d_out = d_out;
  at.v = d_out + r.block_m * r.value_dim * element_size;
  at.bytes = ring_bytes(r.stages, qk_bytes, dov_bytes);
  return at;
}

constexpr int64_t bias_gradient_shared_bytes(const Row& r, int32_t element_size) {
  return bias_gradient_layout(r, element_size).bytes + kBlockStateBytes;
}

// Decode merges its warps' O a few columns at a time; a padded pitch avoids bank conflicts.
constexpr int32_t decode_merge_columns(const Row& r) {
  return r.block_m > 16 ? 16 : r.block_m == 8 && r.value_dim % 64 == 0 ? 64 : 32;
}
constexpr int32_t decode_merge_pitch(const Row& r) { return decode_merge_columns(r) + 4; }

// Whether Q is kept in shared memory, because in registers it would leave too few.
constexpr bool decode_shares_queries(int32_t block_m, int32_t head_dim) { return block_m * head_dim > 2048; }

inline constexpr int32_t kDecodeSegmentBytes = 96;  // size of decode::Segment
inline constexpr int32_t kDecodeRowBytes = 12;      // a row's scale and the range of its keys

struct DecodeLayout {
  int32_t warp_ring;      // bytes of one warp's ring; the warps' rings lie one after the other from 0 on
  int32_t merge_o;        // O [warps, M, merge pitch] float32
  int32_t queries;        // decode_shares_queries: Q, its scale and the range of its keys, until O is merged
  int32_t merge_softmax;  // m and l [warps, M], two float32
  int32_t segments;  // [warps, stages + 2]: the segments of the keys in the stages, one before and one after
  int32_t pages;     // int32 [warps, stages, keys of a warp]: pages of the keys that are loaded next
  int32_t scales;    // float32 [warps, stages, 2, keys of a warp]: scales by page of float8 keys and values,
                     // unless decode_scales_replace_stage()
  int32_t bytes;
};

// The rows' tiles that form a tile over float8 pools. A stage then has 32 keys if there are enough registers,
// because products and exponentials of 32 keys have the latency of 16.
constexpr int32_t decode_float8_tiles(const Row& r) {
  return r.block_n / r.warps < 32 && r.block_m <= 16 ? 2 : 1;
}
// Their stages, in the memory of the 16-bit ones.
constexpr int32_t decode_float8_stages(const Row& r) { return 2 * r.stages / decode_float8_tiles(r); }
// Whether the scales of pages take the place of a stage, as there are many. Two CTAs would else not fit an SM
// at d64.
constexpr bool decode_scales_replace_stage(const Row& r) { return decode_float8_stages(r) > 4; }

// Whether warps prefetch table entries; others have too few registers.
constexpr bool decode_prefetches_table(int32_t block_m, int32_t head_dim) {
  return block_m <= 16 && head_dim <= 128;
}

// A stage of a float8 pool has half the bytes or twice the keys, so its rings have the same bytes.
constexpr DecodeLayout decode_layout(const Row& r, int32_t element_size) {
  const int32_t warp_keys = r.block_n / r.warps;
  const int32_t warp_ring =
      ring_bytes(r.stages, warp_keys * r.head_dim * element_size, warp_keys * r.value_dim * element_size);
  const int32_t merge_o = r.warps * warp_ring, rows = r.warps * r.block_m;
  const int32_t o_bytes = rows * decode_merge_pitch(r) * int32_t{sizeof(float)};
  const int32_t query_bytes = decode_shares_queries(r.block_m, r.head_dim)
                                  ? r.block_m * (r.head_dim * element_size + kDecodeRowBytes)
                                  : 0;
  const int32_t merge_softmax = merge_o + larger(o_bytes, query_bytes);
  const int32_t segments = merge_softmax + rows * 2 * int32_t{sizeof(float)};
  const bool float8 = r.takes(DType::kF8E4M3);
  const int32_t stages = float8 ? decode_float8_stages(r) : r.stages;
  const int32_t pages = segments + r.warps * (stages + 2) * kDecodeSegmentBytes;
  const int32_t words = r.warps * r.stages * warp_keys * int32_t{sizeof(int32_t)} * (float8 ? 2 : 1);
  const int32_t scales = pages + (decode_prefetches_table(r.block_m, r.head_dim) ? words : 0);
  const int32_t bytes = scales + (float8 && !decode_scales_replace_stage(r) ? 2 * words : 0);
  return {warp_ring, merge_o, merge_o, merge_softmax, segments, pages, scales, bytes};
}

constexpr int64_t decode_shared_bytes(const Row& r, int32_t element_size) {
  return decode_layout(r, element_size).bytes + kBlockStateBytes;
}

}  // namespace jax_flash
