// Runs a kernel of one block on arrays of float, and compares its output.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <type_traits>
#include <vector>

#include "cuda/launch.h"
#include "cuda/ptx/math.cuh"

namespace jax_flash::units {

inline int failed = 0;

inline void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "CUDA: %s\n", cudaGetErrorString(status));
  std::exit(2);
}

// Small integers: exact in every dtype, and so are sums of their products.
inline std::vector<float> integers(size_t count, int seed = 1) {
  std::vector<float> x(count);
  uint32_t state = static_cast<uint32_t>(seed) * 2654435761u;
  for (float& value : x) {
    state = state * 1664525u + 1013904223u;
    value = static_cast<float>(static_cast<int>(state >> 24) % 5 - 2);
  }
  return x;
}

template <class Body, class = void>
struct ElementOf {
  using Type = float;
};
template <class Body>
struct ElementOf<Body, std::void_t<typename Body::Element>> {
  using Type = typename Body::Element;
};

// bfloat16 products need sm_80.
template <class Body>
__device__ constexpr bool runs_here() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  return !std::is_same_v<typename ElementOf<Body>::Type, bfloat16>;
#else
  return true;
#endif
}

template <class Body>
__global__ void one_block(Body body, const float* in, float* out) {
  if constexpr (runs_here<Body>()) body(in, out);
}

// The output of body(in, out), run by a block of `threads`: `count` elements, NaN where it writes none.
template <class Body>
std::vector<float> run(Body body, int threads, const std::vector<float>& in, size_t count) {
  constexpr size_t kShared = 40 << 10;
  std::vector<float> out(count, std::nanf(""));
  float *from = nullptr, *to = nullptr;
  check(cudaMalloc(reinterpret_cast<void**>(&from), in.size() * 4 + 16));
  check(cudaMalloc(reinterpret_cast<void**>(&to), count * 4 + 16));
  check(cudaMemcpy(from, in.data(), in.size() * 4, cudaMemcpyHostToDevice));
  check(cudaMemcpy(to, out.data(), count * 4, cudaMemcpyHostToDevice));
  check(launch(one_block<Body>, 1, threads, kShared, nullptr, body, from, to));
  check(cudaMemcpy(out.data(), to, count * 4, cudaMemcpyDeviceToHost));
  check(cudaFree(from));
  check(cudaFree(to));
  return out;
}

// |got − wanted| ≤ tolerance · |wanted|, for every element.
inline void expect(const std::string& name, const std::vector<float>& got,
                   const std::function<double(int)>& wanted, double tolerance = 0) {
  for (int i = 0; i < static_cast<int>(got.size()); ++i) {
    const double right = wanted(i);
    if (got[i] == right || (std::isnan(got[i]) && std::isnan(right))) continue;
    if (std::fabs(got[i] - right) <= tolerance * std::fabs(right)) continue;
    std::printf("%s: FAILED at %d: got %.9g, not %.9g\n", name.c_str(), i, got[i], right);
    ++failed;
    return;
  }
  std::printf("%s: ok\n", name.c_str());
}

struct Built {
  using Element = bfloat16;
  __device__ void operator()(const float*, float* out) const { out[0] = 1; }
};

inline bool has_bfloat16() { return run(Built{}, 1, {}, 1)[0] == 1; }

void test_ptx();
void test_divisor();
void test_tiles();
void test_scores();
void test_ranges();
void test_blocks();
void test_masks();
void test_gradients();

}  // namespace jax_flash::units
