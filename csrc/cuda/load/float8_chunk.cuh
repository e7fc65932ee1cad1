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
      return each_pair([](uint32_t two) { return ptx::widen_float8<T, kFormat>(two); });
    } else {
      return each_float<kFormat>(1);
    }
  }
  // The chunk times a scale, rounded to T.
  template <DType kFormat>
  __device__ __forceinline__ uint4 wide(float scale) const {
    if constexpr (sizeof(T) == 2) {
      return each_pair([=](uint32_t two) {
        const float2 x = ptx::float8_to_floats<kFormat>(two);
        return ptx::pack<T>(x.x * scale, x.y * scale);
      });
    } else {
      return each_float<kFormat>(scale);
    }
  }

 private:
  template <class F>
  __device__ __forceinline__ uint4 each_pair(F widen) const {
    return {widen(words[0]), widen(words[0] >> 16), widen(words[1]), widen(words[1] >> 16)};
  }
  template <DType kFormat>
  __device__ __forceinline__ uint4 each_float(float scale) const {
    const auto at = [&](int i) {
      return __float_as_uint(float8_to_float<kFormat>(static_cast<uint8_t>(words[0] >> 8 * i)) * scale);
    };
    return {at(0), at(1), at(2), at(3)};
  }
};

}  // namespace jax_flash
