// The wrappers of TMA and wgmma, and the descriptors between them: tiles are loaded by tensor maps,
// multiplied from shared memory and from registers, and compared with the host's products, exactly. The
// wrappers of clusters: what each CTA of a pair comes to see of the other. Needs an sm_90 GPU.
#include <cstdio>
#include <cstdlib>
#include <type_traits>
#include <vector>

#include "cuda/launch.h"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/tensor_map.h"
#include "cuda/tile/accumulator.cuh"
#include "cuda/tile/descriptor.cuh"
#include "cuda/tile/operands.cuh"
#include "hopper_units.h"

namespace jax_flash {
namespace {

constexpr int kRows = 64, kHeads = 3, kHead = 1;

template <class Tile>
__device__ void copy_tile(uint32_t to, const CUtensorMap& map, uint32_t barrier) {
  ptx::barrier_expect(barrier, Tile::kBytes);
  for (int column = 0; column < Tile::kColumns; column += Tile::kPanel * 8)
    ptx::copy_box(to + Tile::panel_offset(column / 8), map, barrier, {column, kHead, 0, 0, 0});
}

// s = q kᵀ [64, N] and o = s v [64, D], one warpgroup.
template <class T, int N, int D, int Panel>
__global__ void __launch_bounds__(128)
    products(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
             const __grid_constant__ CUtensorMap v_map, float* s_out, float* o_out) {
  using Rows = SharedTile<T, kRows, D, false, Panel>;
  using Keys = SharedTile<T, N, D, false, Panel>;
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
template <class T, int N, int D, int Panel>
int run(int rows, int keys, int d) {
  constexpr int kPanel = Panel * 8, kShared = SharedTile<T, kRows + 2 * N, D, false, Panel>::kBytes + 8;
  if (kShared > 227 << 10) return 0;
  const Operand<T> q(rows, d, 1), k(keys, d, 2), v(keys, d, 3);
  float* out;
  check(cudaMalloc(&out, kRows * (N + D) * 4), "cudaMalloc");
  check(cudaFuncSetAttribute(products<T, N, D, Panel>, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared),
        "shared");
  products<T, N, D, Panel>
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
  std::printf("%s, N %d, D %d in panels of %d, %d rows, %d keys, d %d: ",
              std::is_same_v<T, __half> ? "float16" : "bfloat16", N, D, kPanel, rows, keys, d);
  std::printf(wrong ? "FAILED, %d wrong\n" : "ok\n", wrong);
  return wrong;
}

template <class T, int N, int D, int Panel = panel_of(D / 8)>
int run() {
  return run<T, N, D, Panel>(kRows, N, D) + run<T, N, D, Panel>(kRows - 5, N - 7, D - 8);
}

template <class T>
int run_type() {
  return run<T, 32, 64>() + run<T, 64, 64>() + run<T, 80, 64>() + run<T, 96, 64>() + run<T, 112, 64>() +
         run<T, 128, 64>() + run<T, 144, 64>() + run<T, 160, 64>() + run<T, 176, 64>() + run<T, 192, 64>() +
         run<T, 256, 64>() + run<T, 128, 32>() + run<T, 128, 96>() + run<T, 128, 128>() + run<T, 96, 192>() +
         run<T, 80, 256>() + run<T, 112, 80>() + run<T, 112, 80, 8>() + run<T, 112, 96, 8>() +
         run<T, 128, 96, 2>();
}

constexpr int kCluster = 2, kBlocks = 16, kThreads = 128;
constexpr uint32_t kPoison = 0xDEADBEEF, kGuard = 1024;  // bytes on either side of a tile
// Cycles to wait for an event that must happen, and for one that must not.
constexpr int64_t kLong = 1 << 30, kShort = 1 << 16;

// A word that no other block has.
constexpr uint32_t word_of(uint32_t block, uint32_t n) { return 0xA0000000 + block * 16 + n; }

// Whether the barrier's first phase ends in time. barrier_wait would hang if it never did.
__device__ bool ended(uint32_t barrier, int64_t cycles) {
  const int64_t start = clock64();
  uint32_t done;
  do {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "mbarrier.test_wait.parity.shared.b64 done, [%1], 0;\n"
        "selp.u32 %0, 1, 0, done;\n"
        "}"
        : "=r"(done)
        : "r"(barrier)
        : "memory");
  } while (!done && clock64() - start < cycles);
  return done;
}

__device__ uint32_t load_from(uint32_t shared, uint32_t rank) {
  uint32_t x;
  asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(x) : "r"(ptx::address_in(shared, rank)) : "memory");
  return x;
}

__device__ void tell(uint32_t*& out, uint32_t x) {
  if (threadIdx.x == 0) *out = x;
  ++out;
}

// __syncwarp comes first because the threads of a warp may have diverged.
__device__ void meet() {
  __syncwarp();
  ptx::sync_cluster();
}

// Fills `bytes` of shared memory with kPoison and initialises barriers for `count` arrivals behind them, in
// all blocks of the cluster.
__device__ uint32_t prepare(uint32_t bytes, uint32_t barriers, uint32_t count) {
  const uint32_t shared = ptx::shared_address(ptx::dynamic_shared_1024());
  for (uint32_t i = threadIdx.x * 4; i < bytes; i += kThreads * 4) ptx::store_shared(shared + i, kPoison);
  ptx::fence_async_shared();
  if (threadIdx.x == 0) {
    for (uint32_t i = 0; i < barriers; ++i) ptx::barrier_init(shared + bytes + i * ptx::kBarrierBytes, count);
    ptx::fence_barriers();
  }
  meet();
  return shared;
}

__global__ void __launch_bounds__(kThreads) ranks(uint32_t* out) {
  out += blockIdx.x;
  tell(out, ptx::cluster_rank());
}

// Each block reads both blocks' words after a cluster barrier, which one of the two reaches late.
__global__ void __launch_bounds__(kThreads) meetings(uint32_t* out) {
  out += blockIdx.x * kCluster * kCluster;
  const uint32_t word = prepare(4, 0, 0);
  for (uint32_t late = 0; late < kCluster; ++late) {
    if (threadIdx.x == kThreads - 1) {
      const int64_t start = clock64();
      while (blockIdx.x % kCluster == late && clock64() - start < kShort) continue;
      ptx::store_shared(word, word_of(blockIdx.x, late));
    }
    meet();
    for (uint32_t rank = 0; rank < kCluster; ++rank) tell(out, load_from(word, rank));
    meet();
  }
}

// Barriers of two arrivals, one by its own block and one by the other block, in both orders and for both
// blocks. A block that is second waits until the other one has arrived.
__global__ void __launch_bounds__(kThreads) arrivals(uint32_t* out) {
  constexpr uint32_t kOrders = 4;
  out += blockIdx.x * kOrders * 2;
  const uint32_t barriers = prepare(0, kOrders, 2);
  for (uint32_t order = 0; order < kOrders; ++order) {
    const uint32_t barrier = barriers + order * ptx::kBarrierBytes, to = order % kCluster;
    const bool here = blockIdx.x % kCluster == to, here_first = order < kCluster;
    if (threadIdx.x == 0 && here == here_first) {
      if (here) {
        ptx::barrier_arrive(barrier);
      } else {
        ptx::barrier_arrive_in(barrier, to);
      }
    }
    meet();
    tell(out, ended(barrier, kShort));
    meet();
    if (threadIdx.x == 0 && here != here_first) ptx::barrier_arrive_in(barrier, to);
    tell(out, ended(barrier, here ? kLong : kShort));
    meet();
  }
}

// Each block sends the other two words; each barrier waits for 8 bytes.
__global__ void __launch_bounds__(kThreads) stores(uint32_t* out) {
  constexpr uint32_t kWords = 8;
  out += blockIdx.x * (2 + kWords);
  const uint32_t words = prepare(kWords * 4, 1, 1), barrier = words + kWords * 4;
  if (threadIdx.x == 0) ptx::barrier_expect(barrier, 8);
  meet();
  for (uint32_t n = 0; n < 2; ++n) {
    if (threadIdx.x == 0)
      ptx::store_in(words + (2 + 3 * n) * 4, word_of(blockIdx.x, n), barrier, blockIdx.x % kCluster ^ 1);
    tell(out, ended(barrier, n == 1 ? kLong : kShort));
    meet();
  }
  for (uint32_t i = 0; i < kWords; ++i) tell(out, ptx::load_shared(words + i * 4));
}

// A tile of several boxes, copied to both blocks by the one numbered `sender`.
template <class Tile>
__global__ void __launch_bounds__(kThreads)
    copies(uint32_t* out, const __grid_constant__ CUtensorMap map, ptx::Coordinates at, uint32_t sender) {
  constexpr int kPanels = Tile::kChunks / Tile::kPanel;
  constexpr uint32_t kBytes = Tile::kBytes + 2 * kGuard;
  out += blockIdx.x * (kPanels + kBytes / 4);
  const uint32_t shared = prepare(kBytes, 1, 1), tile = shared + kGuard, barrier = shared + kBytes;
  if (threadIdx.x == 0) ptx::barrier_expect(barrier, Tile::kBytes);
  meet();
  for (int panel = 0; panel < kPanels; ++panel) {
    if (threadIdx.x == 0 && blockIdx.x % kCluster == sender)
      ptx::copy_box_to((1 << kCluster) - 1, tile + Tile::panel_offset(panel * Tile::kPanel), map, barrier,
                       at);
    at.column += Tile::kPanel * 8;
    tell(out, ended(barrier, panel + 1 == kPanels ? kLong : kShort));
    meet();
  }
  for (uint32_t i = threadIdx.x; i < kBytes / 4; i += kThreads) out[i] = ptx::load_shared(shared + i * 4);
}

// Whether each block has written the `count` words expected(block, i).
template <class Expected, class... Parameters>
int run_clusters(const char* what, int count, const Expected& expected, size_t shared,
                 void (*kernel)(uint32_t*, Parameters...), std::type_identity_t<Parameters>... arguments) {
  std::vector<uint32_t> got(kBlocks * count);
  uint32_t* out;
  check(cudaMalloc(&out, got.size() * 4), "cudaMalloc");
  check(cudaMemset(out, 0xFF, got.size() * 4), "memset");
  check(launch_clusters(kernel, kCluster, kBlocks, kThreads, shared, nullptr, out, arguments...), what);
  check(cudaMemcpy(got.data(), out, got.size() * 4, cudaMemcpyDeviceToHost), what);
  cudaFree(out);
  int wrong = 0;
  for (int i = 0; i < kBlocks * count; ++i)
    wrong += got[i] != static_cast<uint32_t>(expected(i / count, i % count));
  std::printf("%s: ", what);
  std::printf(wrong ? "FAILED, %d wrong\n" : "ok\n", wrong);
  return wrong;
}

// The box begins in the tensor and ends outside, in rows and columns.
template <int D>
int run_copies(uint32_t sender) {
  using Tile = SharedTile<uint16_t, kRows, D>;
  constexpr int kColumns = D - 8, kAllHeads = 4, kBatch = 3, kLeading = 2,
                kPanels = Tile::kChunks / Tile::kPanel;
  constexpr ptx::Coordinates kAt = {0, 3, 8, 2, 1};
  std::vector<uint16_t> host(kLeading * kBatch * kRows * kAllHeads * kColumns);
  for (size_t i = 0; i < host.size(); ++i) host[i] = static_cast<uint16_t>(i * 2654435761u >> 16);
  uint16_t* device;
  check(cudaMalloc(&device, host.size() * 2), "cudaMalloc");
  check(cudaMemcpy(device, host.data(), host.size() * 2, cudaMemcpyHostToDevice), "copy");
  Problem p{};
  p.dtype = DType::kBF16, p.leading.rank = 1, p.leading.size[0] = kLeading;
  View view;
  view.data = device, view.head = kColumns, view.row = kAllHeads * view.head, view.batch = kRows * view.row;
  view.leading[0] = kBatch * view.batch;
  CUtensorMap map;
  check(make_tensor_map(map, p, view, {kColumns, kAllHeads, kRows, kBatch, Tile::kPanel * 8, kRows}),
        "tensor map");
  std::vector<uint32_t> image((Tile::kBytes + 2 * kGuard) / 4, kPoison);
  for (int row = 0; row < kRows; ++row) {
    for (int column = 0; column < D; column += 2) {
      const bool in = kAt.row + row < kRows && column < kColumns;
      const int64_t from = kAt.leading * view.leading[0] + kAt.batch * view.batch +
                           (kAt.row + row) * view.row + kAt.head * view.head + column;
      image[(kGuard + Tile::offset(row, column / 8)) / 4 + column % 8 / 2] =
          in ? host[from] | uint32_t{host[from + 1]} << 16 : 0;
    }
  }
  char what[64];
  std::snprintf(what, sizeof(what), "copy_box_to, D %d, by block %u", D, sender);
  const int wrong = run_clusters(
      what, kPanels + static_cast<int>(image.size()),
      [&](int, int i) { return i < kPanels ? i + 1 == kPanels : image[i - kPanels]; },
      image.size() * 4 + ptx::kBarrierBytes, copies<Tile>, map, kAt, sender);
  cudaFree(device);
  return wrong;
}

int run_cluster_wrappers() {
  return run_clusters(
             "cluster_rank", 1, [](int block, int) { return block % kCluster; }, 0, ranks) +
         run_clusters(
             "address_in, sync_cluster", kCluster * kCluster,
             [](int block, int i) { return word_of(block - block % kCluster + i % kCluster, i / kCluster); },
             4, meetings) +
         run_clusters(
             "barrier_arrive_in", 8,
             [](int block, int i) { return i % 2 == 1 && block % kCluster == i / 2 % kCluster; }, 32,
             arrivals) +
         run_clusters(
             "store_in", 10,
             [](int block, int i) {
               if (i < 2) return static_cast<uint32_t>(i);
               return i == 4 ? word_of(block ^ 1, 0) : i == 7 ? word_of(block ^ 1, 1) : kPoison;
             },
             40, stores) +
         run_copies<128>(0) + run_copies<128>(1) + run_copies<96>(0) + run_copies<96>(1);
}

}  // namespace
}  // namespace jax_flash

int main() {
  const int wrong = jax_flash::run_type<__half>() + jax_flash::run_type<__nv_bfloat16>() +
                    jax_flash::run_sums() + jax_flash::run_cluster_wrappers();
  std::printf(wrong ? "failed\n" : "all passed\n");
  return wrong != 0;
}
