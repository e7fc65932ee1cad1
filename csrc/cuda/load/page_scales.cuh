// The dequantisation scales of float8 pools: one for each KV head, or for each page and KV head.
#pragma once

#include <cstdint>

#include "core/problem.h"

namespace jax_flash {

// Rows of a tile of the sm_90a kernels that have one scale: boxes have multiples of these.
inline constexpr int kScaledRows = 8;

__device__ __forceinline__ bool has_page_scales(const View& scale) { return scale && scale.batch != 0; }

// The first scale of a float8 pool at one KV head: that of page 0, or of all pages.
__device__ __forceinline__ const float* first_scale(const Problem& p, const View& scale, int64_t leading,
                                                    int32_t kv_head) {
  return scale.as<const float>() + scale.leading_offset(p.leading, leading) + kv_head * scale.head;
}

// The dequantisation scale of a float8 pool at one KV head; 1 if there is none, or if each page has a scale.
__device__ __forceinline__ float scale_of_pool(const Problem& p, const View& scale, int64_t leading,
                                               int32_t kv_head) {
  return !scale || has_page_scales(scale) ? 1 : *first_scale(p, scale, leading, kv_head);
}

// The scale of a page in the pool, whether its own or that of all pages.
__device__ __forceinline__ float scale_of_page(const Problem& p, const View& scale, int64_t leading,
                                               int32_t kv_head, int32_t page) {
  return scale ? first_scale(p, scale, leading, kv_head)[page * scale.batch] : 1;
}

// The scales of a float8 pool's pages at one KV head; null if all pages have the same.
struct PageScales {
  const float* data = nullptr;  // scale of page 0
  int64_t page = 0;             // stride

  __device__ __forceinline__ float at(int32_t page_index) const {
    return data && page_index >= 0 ? data[page_index * page] : 1;
  }
};

__device__ __forceinline__ PageScales page_scales_of(const Problem& p, const View& scale, int64_t leading,
                                                     int32_t kv_head) {
  if (!has_page_scales(scale)) return {};
  return {first_scale(p, scale, leading, kv_head), scale.batch};
}

}  // namespace jax_flash
