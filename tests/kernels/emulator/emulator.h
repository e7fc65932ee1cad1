// CUDA's execution model on the host, enough to run csrc/cuda: a block's threads are fibers that switch at
// barriers and at warp-wide instructions. What hardware leaves undefined is made to fail: shared memory
// begins as NaN, and cp.async writes nothing until it is waited for.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __noinline__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static
#define __align__(n) alignas(n)

using std::max;
using std::min;

struct dim3 {
  uint32_t x, y, z;
  constexpr dim3(uint32_t x_ = 1, uint32_t y_ = 1, uint32_t z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint4 {
  uint32_t x, y, z, w;
};

struct int4 {
  int32_t x, y, z, w;
};
inline int4 make_int4(int32_t x, int32_t y, int32_t z, int32_t w) { return {x, y, z, w}; }

struct int2 {
  int32_t x, y;
};

struct uint2 {
  uint32_t x, y;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

struct float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct float2 {
  float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline int __float_as_int(float x) { return static_cast<int>(__float_as_uint(x)); }
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<uint32_t>(bits)); }

extern dim3 threadIdx, blockIdx, gridDim, blockDim;

namespace emulator {

inline constexpr size_t kSharedBytes = 227 << 10;
extern uint8_t shared[kSharedBytes];

// Runs `body` as `threads` fibers for every block; grids have up to two dimensions.
void run(dim3 blocks, uint32_t threads, const std::function<void()>& body);

void block_barrier();
bool block_any(bool condition);
void group_barrier(uint32_t number, uint32_t threads);
void wait_until(const std::function<bool()>& condition);

// Every lane of the warp passes its argument; the last lane to arrive runs `all` on all 32.
void warp_collective(void* argument, void (*all)(void* const (&arguments)[32]));

// The cp.async queue of this thread.
void copy_later(void* to, const void* from, size_t bytes, size_t valid);
void commit_copies();
void wait_copies(int pending);

}  // namespace emulator

inline void __syncthreads() { emulator::block_barrier(); }
inline int __syncthreads_or(int condition) { return emulator::block_any(condition); }
inline int __syncthreads_and(int condition) { return !emulator::block_any(!condition); }
inline void __syncwarp() {
  emulator::warp_collective(nullptr, [](void* const(&)[32]) {});
}

template <class T, int kKind>
T emulated_shuffle(T x, int operand) {
  struct Argument {
    T in, out;
    int operand;
  } argument{x, x, operand};
  emulator::warp_collective(&argument, [](void* const(&all)[32]) {
    for (int lane = 0; lane < 32; ++lane) {
      auto* self = static_cast<Argument*>(all[lane]);
      const int below = lane < self->operand ? lane : lane - self->operand;
      const int from = kKind == 0 ? lane ^ self->operand : kKind == 1 ? self->operand % 32 : below;
      self->out = static_cast<Argument*>(all[from])->in;
    }
  });
  return argument.out;
}
template <class T>
T __shfl_xor_sync(uint32_t, T x, int mask) {
  return emulated_shuffle<T, 0>(x, mask);
}
template <class T>
T __shfl_sync(uint32_t, T x, int lane) {
  return emulated_shuffle<T, 1>(x, lane);
}
template <class T>
T __shfl_up_sync(uint32_t, T x, int distance) {
  return emulated_shuffle<T, 2>(x, distance);
}
inline void atomicAdd(float* to, float x) { *to += x; }  // fibers take turns
inline uint32_t atomicAdd(uint32_t* to, uint32_t x) { return (*to += x) - x; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<uint32_t>(x)); }
// Byte i of the result is the byte of y:x that hex digit i of `selector` selects; no digit asks for a sign.
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t bytes = uint64_t{y} << 32 | x;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i)
    result |= static_cast<uint32_t>(bytes >> (selector >> 4 * i & 7) * 8 & 0xFF) << 8 * i;
  return result;
}
inline uint32_t __ballot_sync(uint32_t, bool vote) {
  struct Argument {
    bool vote;
    uint32_t votes;
  } argument{vote, 0};
  emulator::warp_collective(&argument, [](void* const(&all)[32]) {
    uint32_t votes = 0;
    for (int lane = 0; lane < 32; ++lane) votes |= uint32_t{static_cast<Argument*>(all[lane])->vote} << lane;
    for (void* argument : all) static_cast<Argument*>(argument)->votes = votes;
  });
  return argument.votes;
}
template <class T>
T __ldg(const T* from) {
  return *from;
}
inline bool __any_sync(uint32_t mask, bool vote) { return __ballot_sync(mask, vote) != 0; }
inline bool __all_sync(uint32_t mask, bool vote) { return !__any_sync(mask, !vote); }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
