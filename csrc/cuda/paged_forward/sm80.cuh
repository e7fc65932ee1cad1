// The forward over pages: the loop of cuda/forward/sm80.cuh, its keys and values gathered through the block
// table.
#pragma once

#include "cuda/forward/sm80.cuh"
#include "cuda/load_pages.cuh"

namespace jax_flash::inline JF_FAMILY {

// DenseState's counterpart. Pool: T, or uint8_t for float8.
template <class T, class Pool, int kRows, int kStages>
struct PagedState : BlockState<T> {
  using Source = PageSource<T, Pool, kRows, kStages>;
  static constexpr bool kScaled = sizeof(Pool) == 1;  // value = stored · scale
  GlobalPages<Pool> key, value;
  PageTable table;
  float key_scale, value_scale;
  mutable typename Source::Addresses addresses;

  __device__ void prepare(const Problem& p, const TileWork* schedule, int32_t q_tiles, int32_t block_m,
                          int32_t block_n) {
    BlockState<T>::prepare(p, schedule, q_tiles, block_m, block_n);
    const BlockWork& work = this->work;
    const int32_t kv_head = p.kv_head(work.head);
    key = pages_of<Pool>(p, p.key, work.leading, kv_head, p.head_dim);
    value = pages_of<Pool>(p, p.value, work.leading, kv_head, p.value_dim);
    table = page_table(p.block_tables, p.leading, work.leading, work.tile.index, p.page_size, p.pages);
    key_scale = scale_of_pool(p, p.k_scale, work.leading, kv_head);
    value_scale = scale_of_pool(p, p.v_scale, work.leading, kv_head);
  }
  __device__ __forceinline__ Source source() const {
    return {key, value, table, this->work.tile.k_len, addresses};
  }
};

template <class T, class Pool, ScoreKind Kind, int HeadDim, int ValueDim, int M, int N, int Stages, int Warps,
          int Blocks>
struct PagedForwardSm80 : ForwardSm80<T, HeadDim, ValueDim, M, N, Stages, Warps, Blocks, Kind,
                                      PagedState<T, Pool, forward_keys(HeadDim, M, N, Warps, Kind), Stages>> {
};

// plan() counts the addresses apart.
static_assert(sizeof(PagedState<float, uint8_t, 64, 1>) - sizeof(KeyAddress[2][64]) <= kBlockStateBytes);

template <class T, int... kNumbers>
cudaError_t launch_paged_forward_sm80(const Problem& p, const LaunchPlan& plan, void* workspace,
                                      cudaStream_t stream) {
  if (p.kv_dtype == DType::kF8E4M3) {
    return launch_forward_sm80<PagedForwardSm80<T, uint8_t, ScoreKind::kGeneral, kNumbers...>>(
        p, plan, workspace, stream);
  }
  if (plan.general()) {
    return launch_forward_sm80<PagedForwardSm80<T, T, ScoreKind::kGeneral, kNumbers...>>(p, plan, workspace,
                                                                                         stream);
  }
  return launch_forward_sm80<PagedForwardSm80<T, T, ScoreKind::kPlain, kNumbers...>>(p, plan, workspace,
                                                                                     stream);
}

}  // namespace jax_flash::inline JF_FAMILY

#undef JF_DEFINE_LAUNCH
#define JF_DEFINE_LAUNCH(name, dtype, ...)                                                           \
  namespace jax_flash {                                                                              \
  cudaError_t name(const Problem& p, const LaunchPlan& plan, void* workspace, cudaStream_t stream) { \
    return launch_paged_forward_sm80<dtype, __VA_ARGS__>(p, plan, workspace, stream);                \
  }                                                                                                  \
  }
