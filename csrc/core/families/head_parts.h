// The parts into which the Hopper backward divides the query heads of a KV head.
#pragma once

#include <algorithm>

#include "core/families/hopper_layout.h"
#include "core/plan/call.h"
#include "core/plan/workspace.h"

namespace jax_flash {

// Into how many parts the backward divides the query heads of a KV head. With few key tiles, as on a GPU that
// has one of eight KV heads, many SMs would be idle, and with a causal mask all would wait for the CTA of the
// first keys.
class HeadParts {
 public:
  HeadParts(const KernelRow& row, const Call& call) : call_(call) {
    const Shapes& s = call.shapes;
    const bool band = call.spec.left >= 0 && call.spec.right >= 0;
    const int64_t rows = call.rows_of_sequence(), columns = call.row_arrays() * s.kv_heads;
    group_ = s.kv_heads > 0 ? s.heads / s.kv_heads : 1;
    rows_ = group_ * (band ? std::min(rows, call.visible_keys() + row.block_n) : rows);
    key_rows_ = columns * s.k_rows;
    tiles_ = columns * ceil_div(s.k_rows, row.block_n);
    const int32_t ctas = hopper::backward_in_clusters(row) ? hopper::backward_cluster_ctas(row) : 1;
    workers_ = std::max(1, call.device.sm_count * row.blocks / ctas);
  }

  // The divisor of the group that takes the least time.
  int32_t best() const {
    int64_t parts = 1;
    for (int64_t n = 2; n <= group_ && key_rows_ <= kMostDividedKeys; ++n) {
      if (group_ % n == 0 && n * key_rows_ <= kMostPartRows && time(n) < time(parts)) parts = n;
    }
    return static_cast<int32_t>(parts);
  }

 private:
  // The time in query rows that one CTA goes through. A key tile costs as much as some rows more; in parts
  // its gradients are stored in float32, and added by another kernel.
  int64_t time(int64_t parts) const {
    constexpr int64_t kOfTile = 200, kOfPart = 450, kOfKernel = 150;
    const int64_t more = parts > 1 ? kOfPart : kOfTile, kernel = parts > 1 ? kOfKernel : 0;
    const int64_t longest = rows_ / parts + more, tiles = tiles_ * parts;
    const bool causal = call_.spec.left < 0 && call_.spec.right >= 0;
    if (!causal) return ceil_div(tiles, workers_) * longest + kernel;
    const int64_t mean = rows_ / parts / 2 + more;  // the longest tiles come first
    return std::max(longest, tiles * mean / workers_) + kernel;
  }

  const Call& call_;
  int64_t group_, rows_, key_rows_, tiles_, workers_;
};

}  // namespace jax_flash
