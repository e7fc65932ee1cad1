// What lies in the shared memory of a CTA of the Hopper family: the same numbers for plan and kernel.
#pragma once

#include <cstdint>

namespace jax_flash::hopper {

inline constexpr int32_t kConsumerRows = 64;         // query rows of a consumer warpgroup: M of wgmma
inline constexpr int64_t kStateBytes = 2048;         // barriers and tile states of a team, at most
inline constexpr int64_t kMaxSharedBytes = 232'448;  // that a CTA may use
inline constexpr int64_t kElementBytes = 2;          // float16 and bfloat16

// Q of one tile, and `stages` tiles of K and of V; of each team.
constexpr int64_t forward_tile_bytes(int32_t head_dim, int32_t value_dim, int32_t block_m, int32_t block_n,
                                     int32_t stages) {
  return kElementBytes * (int64_t{block_m} * head_dim + int64_t{block_n} * stages * (head_dim + value_dim));
}

constexpr int64_t forward_shared_bytes(int64_t tile_bytes, int32_t teams) {
  return teams * (tile_bytes + kStateBytes);
}

}  // namespace jax_flash::hopper
