// append_kv: writes new keys and values into the slots of a page pool. Keys are rotated, and both are
// quantised where the pool is float8.
//
// Two tokens may be sent to one slot, and then the later one must win. All tokens of a slot belong to one
// block (tokens.cuh), which takes them in order, and one thread writes the same features of every token, so
// program order is enough.
#include "cuda/append/append.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "core/float8.h"
#include "core/rotary.h"
#include "cuda/append/tokens.cuh"
#include "cuda/launch.h"

namespace jax_flash {
namespace append {
namespace {

constexpr int kBlocksPerMultiprocessor = 4;  // of the grid, at most

// The key or the value operand with its pool. Pool: T, or uint8_t for float8.
template <class T, class Pool>
struct Stream {
  const View &rows, &pool, &scale;
  const T* from;        // of the leading entry
  Pool* to;             // likewise
  const float* scales;  // likewise, or null
  int32_t width;        // head dim
  DType stored;         // of the pool

  __device__ Stream(const AppendProblem& p, int64_t leading, const View& rows_, const View& pool_,
                    const View& scale_, int32_t width_)
      : rows(rows_),
        pool(pool_),
        scale(scale_),
        from(rows.as<const T>() + rows.leading_offset(p.leading, leading)),
        to(pool.as<Pool>() + pool.leading_offset(p.leading, leading)),
        scales(scale ? scale.as<const float>() + scale.leading_offset(p.leading, leading) : nullptr),
        width(width_),
        stored(p.pool_dtype) {}

  __device__ const T* source(const AppendProblem& p, const Token& t, int32_t head) const {
    if (p.packed()) return from + t.row * rows.row + head * rows.head;
    return from + rows.offset(t.sequence, head, t.row - int64_t{t.sequence} * p.rows);
  }
  __device__ Pool* target(const Token& t, int32_t head) const {
    return to + pool.offset(t.at.page, head, t.at.slot);
  }
  __device__ float divisor(int32_t head) const { return scales ? scales[head * scale.head] : 1.0f; }

  // Quantises x, a key or value rounded to T: a rotated one is rounded as if it had come that way from the
  // caller.
  __device__ void write(const Token& t, int32_t head, int32_t feature, T x) const {
    Pool* const slot = target(t, head) + feature;
    if constexpr (sizeof(Pool) == 1) {
      *slot = float_to_float8(static_cast<float>(x) / divisor(head), stored);
    } else {
      *slot = x;
    }
  }
};

// Calls f(head, i) for this thread's share of all KV heads and i in [0, count).
template <class F>
__device__ inline void for_each_item(int32_t heads, int32_t count, F f) {
  for (int32_t at = static_cast<int32_t>(threadIdx.x); at < heads * count; at += kThreads) {
    f(at / count, at % count);
  }
}

// Copies features [first, width).
template <class T, class Pool>
__device__ inline void copy_features(const AppendProblem& p, const Stream<T, Pool>& s, const Token& t,
                                     int32_t first) {
  for_each_item(p.kv_heads, s.width - first, [&](int32_t head, int32_t i) {
    s.write(t, head, first + i, s.source(p, t, head)[first + i]);
  });
}

// Copies rows that consist of whole 16-byte words.
template <class T>
__device__ inline void copy_words(const AppendProblem& p, const Stream<T, T>& s, const Token& t) {
  constexpr int32_t kWord = 16 / static_cast<int32_t>(sizeof(T));
  for_each_item(p.kv_heads, s.width / kWord, [&](int32_t head, int32_t i) {
    reinterpret_cast<uint4*>(s.target(t, head))[i] = reinterpret_cast<const uint4*>(s.source(p, t, head))[i];
  });
}

template <class T, class Pool>
__device__ inline void copy_row(const AppendProblem& p, const Stream<T, Pool>& s, const Token& t) {
  if constexpr (sizeof(T) == sizeof(Pool)) {
    if (s.width * sizeof(T) % 16 == 0) return copy_words(p, s, t);
  }
  copy_features(p, s, t, 0);
}

// Rotates the first 2 · rotated features and copies the others.
template <class T, class Pool>
__device__ inline void rotate_row(const AppendProblem& p, const Stream<T, Pool>& s, const Token& t,
                                  const float* cos, const float* sin) {
  const int32_t row = rotary_row(t.position, p.positions);
  cos += row * p.cos.row, sin += row * p.sin.row;
  for_each_item(p.kv_heads, p.rotated, [&](int32_t head, int32_t i) {
    const T* const x = s.source(p, t, head);
    const RotaryPair pair = rotary_pair(i, p.rotated, p.spec.interleaved);
    float a = static_cast<float>(x[pair.first]), b = static_cast<float>(x[pair.second]);
    rotate(a, b, cos[i], sin[i]);
    s.write(t, head, pair.first, T(a));
    s.write(t, head, pair.second, T(b));
  });
  copy_features(p, s, t, 2 * p.rotated);
}

template <class T, class Pool>
__global__ void __launch_bounds__(kThreads)
    append_tokens(const __grid_constant__ AppendProblem p, int32_t owners) {
  __shared__ State state;
  const int64_t leading = blockIdx.x / owners;
  const Stream<T, Pool> key(p, leading, p.key, p.k_pages, p.k_scale, p.head_dim);
  const Stream<T, Pool> value(p, leading, p.value, p.v_pages, p.v_scale, p.value_dim);
  const float* cos = p.cos.as<const float>() + p.cos.leading_offset(p.leading, leading);
  const float* sin = p.sin.as<const float>() + p.sin.leading_offset(p.leading, leading);
  const int32_t owner = static_cast<int32_t>(blockIdx.x % owners);
  for_each_token(p, leading, owner, owners, state, [&](const Token& t) {
    if (p.rotated > 0) {
      rotate_row(p, key, t, cos, sin);
    } else {
      copy_row(p, key, t);
    }
    copy_row(p, value, t);
  });
}

template <class T>
cudaError_t launch_for(const AppendProblem& p, int32_t owners, cudaStream_t stream) {
  const int64_t blocks = p.leading.count() * owners;
  if (is_float8(p.pool_dtype)) {
    return launch(append_tokens<T, uint8_t>, blocks, kThreads, 0, stream, p, owners);
  }
  return launch(append_tokens<T, T>, blocks, kThreads, 0, stream, p, owners);
}

}  // namespace
}  // namespace append

cudaError_t launch_append(const AppendProblem& p, int32_t sm_count, cudaStream_t stream) {
  const int64_t tokens = int64_t{p.rows} * (p.packed() ? 1 : p.batch);
  if (tokens == 0 || p.pages == 0 || p.kv_heads == 0) return cudaSuccess;
  // Slots are hashed to blocks, so twice as many blocks as tokens keep most tokens in blocks of their own.
  const int64_t limit = int64_t{append::kBlocksPerMultiprocessor} * sm_count;
  const int32_t owners = static_cast<int32_t>(2 * tokens < limit ? 2 * tokens : limit);
  if (p.dtype == DType::kF16) return append::launch_for<__half>(p, owners, stream);
  if (p.dtype == DType::kBF16) return append::launch_for<__nv_bfloat16>(p, owners, stream);
  return append::launch_for<float>(p, owners, stream);
}

}  // namespace jax_flash
