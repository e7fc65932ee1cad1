// The wrappers of TMA and wgmma, and the descriptors between them: tiles are copied by tensor maps,
// multiplied from shared memory and from registers, and compared with the host's products, exactly. Needs an
// sm_90 GPU.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/tensor_map.h"
#include "cuda/tile/accumulator.cuh"
#include "cuda/tile/descriptor.cuh"
#include "cuda/tile/operands.cuh"

namespace jax_flash {
namespace {

constexpr int kRows = 64, kHeads = 3, kHead = 1;

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::printf("%s: %s\n", what, cudaGetErrorString(status));
  std::exit(1);
}

template <class Tile>
__device__ void copy_tile(uint32_t to, const CUtensorMap& map, uint32_t barrier) {
  ptx::barrier_expect(barrier, Tile::kBytes);
  for (int column = 0; column < Tile::kColumns; column += Tile::kPanel * 8)
    ptx::copy_box(to + Tile::panel_offset(column / 8), map, barrier, {column, kHead, 0, 0, 0});
}

// s = q kᵀ [64, N] and o = s v [64, D], one warpgroup.
template <class T, int N, int D>
__global__ void __launch_bounds__(128)
    products(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
             const __grid_constant__ CUtensorMap v_map, float* s_out, float* o_out) {
  using Rows = SharedTile<T, kRows, D>;
  using Keys = SharedTile<T, N, D>;
  const uint32_t q = ptx::shared_address(ptx::dynamic_shared_1024()), k = q + Rows::kBytes,
                 v = k + Keys::kBytes, barrier = v + Keys::kBytes;
  if (threadIdx.x == 0) {
    ptx::barrier_init(barrier, 3);
    ptx::fence_barriers();
    copy_tile<Rows>(q, q_map, barrier);
    copy_tile<Keys>(k, k_map, barrier);
    copy_tile<Keys>(v, v_map, barrier);
  }
  __syncthreads();
  ptx::barrier_wait(barrier, 0);
  Accumulator<1, N / 8> s;
  Accumulator<1, D / 8> o;
  const RowsDescriptor<Rows> a(q);
  const RowsDescriptor<Keys> b(k);
  const ColumnsDescriptor<Keys> c(v);
  ptx::wgmma_fence();
  ptx::Wgmma<T, N>::template multiply<true>(s.x[0], a.at(0), b.at(0));
#pragma unroll
  for (int step = 1; step < D / 16; ++step)
    ptx::Wgmma<T, N>::template multiply<false>(s.x[0], a.at(step), b.at(step));
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::hold(s.x[0]);
  FragmentsA<T, 1, N / 16> p;
  p.read(RegistersA<T, decltype(s)>{s});
  ptx::hold(p.x[0]);
  ptx::wgmma_fence();
  ptx::Wgmma<T, D>::template multiply<true, 1>(o.x[0], p.x[0][0], c.at(0));
#pragma unroll
  for (int step = 1; step < N / 16; ++step)
    ptx::Wgmma<T, D>::template multiply<false, 1>(o.x[0], p.x[0][step], c.at(step));
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::hold(o.x[0]);
  const int first = static_cast<int>(threadIdx.x) / 32 * 16;
  for_each(s,
           [&](float& x, int slot, int n, int e) { s_out[(first + s.row(slot)) * N + s.column(n) + e] = x; });
  for_each(o,
           [&](float& x, int slot, int n, int e) { o_out[(first + o.row(slot)) * D + o.column(n) + e] = x; });
}

// Rows [rows, kHeads, d] of −1, 0 and 1; a tenth of them are not 0, so that sums are exact in 16 bits.
template <class T>
struct Operand {
  std::vector<T> host;
  T* device = nullptr;
  int rows, d;

  Operand(int rows_, int d_, unsigned seed) : host(rows_ * kHeads * d_), rows(rows_), d(d_) {
    for (T& x : host) {
      seed = seed * 1664525u + 1013904223u;
      const unsigned draw = seed >> 16 & 31;
      x = static_cast<T>(draw == 0 ? -1.0f : draw < 3 ? 1.0f : 0.0f);
    }
    check(cudaMalloc(&device, host.size() * sizeof(T)), "cudaMalloc");
    check(cudaMemcpy(device, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice), "copy");
  }
  ~Operand() { cudaFree(device); }
  float at(int row, int column) const {
    return static_cast<float>(host[(row * kHeads + kHead) * d + column]);
  }
  CUtensorMap map(int box_rows, int box_columns) const {
    Problem p{};
    p.dtype = std::is_same_v<T, __half> ? DType::kF16 : DType::kBF16;
    View view;
    view.data = device, view.head = d, view.row = int64_t{kHeads} * d;
    CUtensorMap made;
    check(make_tensor_map(made, p, view, {d, kHeads, rows, 1, box_columns, box_rows}), "tensor map");
    return made;
  }
};

// `rows` of q and `keys` of k and v exist, of head dim d ≤ D; the tiles' rest is to read as zeros.
template <class T, int N, int D>
int run(int rows, int keys, int d) {
  constexpr int kPanel = SharedTile<T, N, D>::kPanel * 8, kShared = (kRows + 2 * N) * D * 2 + 8;
  if (kShared > 227 << 10) return 0;
  const Operand<T> q(rows, d, 1), k(keys, d, 2), v(keys, d, 3);
  float* out;
  check(cudaMalloc(&out, kRows * (N + D) * 4), "cudaMalloc");
  check(cudaFuncSetAttribute(products<T, N, D>, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared),
        "shared");
  products<T, N, D>
      <<<1, 128, kShared>>>(q.map(kRows, kPanel), k.map(N, kPanel), v.map(N, kPanel), out, out + kRows * N);
  std::vector<float> got(kRows * (N + D));
  check(cudaMemcpy(got.data(), out, got.size() * 4, cudaMemcpyDeviceToHost), "products");
  int wrong = 0;
  for (int i = 0; i < kRows; ++i) {
    std::vector<float> s(N), o(D);
    for (int j = 0; j < N; ++j)
      for (int c = 0; c < d && i < rows && j < keys; ++c) s[j] += q.at(i, c) * k.at(j, c);
    for (int j = 0; j < keys && j < N; ++j)
      for (int c = 0; c < d; ++c) o[c] += s[j] * v.at(j, c);
    for (int j = 0; j < N; ++j) wrong += got[i * N + j] != s[j];
    for (int c = 0; c < D; ++c) wrong += got[kRows * N + i * D + c] != o[c];
  }
  cudaFree(out);
  std::printf("%s, N %d, D %d, %d rows, %d keys, d %d: ", std::is_same_v<T, __half> ? "float16" : "bfloat16",
              N, D, rows, keys, d);
  std::printf(wrong ? "FAILED, %d wrong\n" : "ok\n", wrong);
  return wrong;
}

template <class T, int N, int D>
int run() {
  return run<T, N, D>(kRows, N, D) + run<T, N, D>(kRows - 5, N - 7, D - 8);
}

template <class T>
int run_type() {
  return run<T, 32, 64>() + run<T, 64, 64>() + run<T, 80, 64>() + run<T, 96, 64>() + run<T, 112, 64>() +
         run<T, 128, 64>() + run<T, 144, 64>() + run<T, 160, 64>() + run<T, 176, 64>() + run<T, 192, 64>() +
         run<T, 256, 64>() + run<T, 128, 32>() + run<T, 128, 96>() + run<T, 128, 128>() + run<T, 96, 192>() +
         run<T, 80, 256>();
}

}  // namespace
}  // namespace jax_flash

int main() {
  const int wrong = jax_flash::run_type<__half>() + jax_flash::run_type<__nv_bfloat16>();
  std::printf(wrong ? "failed\n" : "all passed\n");
  return wrong != 0;
}
