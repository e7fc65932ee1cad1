// Decode over latent pools (multi-head latent attention), whose V is the first columns of K: how query rows
// are cut into chunks, and what lies in shared memory. The same numbers for plan and kernels.
#pragma once

#include <cstdint>

namespace jax_flash::latent {

// The query rows of a KV head are cut into chunks of at most `rows`: some heads of one token, or all heads of
// a few tokens. An entry is one chunk of one sequence.
struct Chunks {
  int32_t tokens;  // of a chunk, at least 1
  int32_t heads;   // chunks of a token's heads

  constexpr Chunks(int64_t group, int32_t rows)
      : tokens(group < rows ? static_cast<int32_t>(rows / group) : 1),
        heads(static_cast<int32_t>((group + rows - 1) / rows)) {}
};

inline constexpr int64_t kStateBytes = 2048;  // barriers, segments and softmax states, at most

// Q, `stages` tiles of K, and P.
constexpr int64_t tile_bytes(int32_t head_dim, int32_t block_m, int32_t block_n, int32_t stages) {
  return 2 * (int64_t{head_dim} * (block_m + int64_t{stages} * block_n) + int64_t{block_m} * block_n);
}

// The portable kernel. Offsets and sizes are in bytes; Q lies at 0.
struct PortableLayout {
  int32_t keys;      // stages of K [N, d]
  int32_t weights;   // P [M, 32]
  int32_t scores;    // S [splits, M, pitch] float32
  int32_t softmax;   // m and l [M], two float32
  int32_t alpha;     // [M] float32
  int32_t key_rows;  // [stages + 1, N]: where the keys lie
  int32_t bytes;
  int32_t pitch;  // elements
};

inline constexpr int32_t kLeastTile = 32;  // columns of P's tile, at least

constexpr PortableLayout portable_layout(int32_t head_dim, int32_t block_m, int32_t block_n, int32_t stages,
                                         int32_t splits) {
  PortableLayout at{};
  at.pitch = block_n + 1;
  at.keys = 2 * block_m * head_dim;
  at.weights = at.keys + 2 * stages * block_n * head_dim;
  at.scores = at.weights + 2 * block_m * kLeastTile;
  at.softmax = at.scores + 4 * splits * block_m * at.pitch;
  at.alpha = at.softmax + 8 * block_m;
  at.key_rows = at.alpha + 4 * block_m;
  at.bytes = at.key_rows + 8 * (stages + 1) * block_n;
  return at;
}

// How many parts the head dim is split into in S = Q Kᵀ, by warps that each have 16 × 16 of S.
constexpr int32_t portable_splits(int32_t block_m, int32_t block_n, int32_t warps) {
  return warps / (block_m / 16 * (block_n / 16));
}

}  // namespace jax_flash::latent
