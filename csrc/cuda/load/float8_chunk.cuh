// float8 elements of a pool, widened to the dtype of the queries in registers.
#pragma once

#include <cstdint>

#include "core/float8.h"
#include "cuda/ptx/float8.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/tile/shared_tile.cuh"

namespace jax_flash {

// float8 elements for a 16-byte chunk of T.
template <class T>
struct Float8Chunk {
  static constexpr int kWords = kChunk<T> / 4;
  uint32_t words[kWords];

  __device__ __forceinline__ void fill(uint32_t word) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = word;
  }
  __device__ __forceinline__ void read(const uint8_t* from) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = reinterpret_cast<const uint32_t*>(from)[i];
  }
  // The chunk, widened to T.
  template <DType kFormat>
  __device__ __forceinline__ uint4 wide() const {
    if constexpr (sizeof(T) == 2) {
      return {ptx::widen_float8<T, kFormat>(words[0]), ptx::widen_float8<T, kFormat>(words[0] >> 16),
              ptx::widen_float8<T, kFormat>(words[1]), ptx::widen_float8<T, kFormat>(words[1] >> 16)};
    } else {
      const auto at = [&](int i) {
        return __float_as_uint(float8_to_float<kFormat>(static_cast<uint8_t>(words[0] >> 8 * i)));
      };
      return {at(0), at(1), at(2), at(3)};
    }
  }
  // A chunk of T times a scale, rounded to T.
  __device__ __forceinline__ static uint4 scaled(uint4 x, float scale) {
    const auto times = [&](uint32_t word) {
      if constexpr (sizeof(T) == 4) {
        return __float_as_uint(__uint_as_float(word) * scale);
      } else {
        const float2 two = ptx::unpack<T>(word);
        return ptx::pack<T>(two.x * scale, two.y * scale);
      }
    };
    return {times(x.x), times(x.y), times(x.z), times(x.w)};
  }
};

}  // namespace jax_flash
