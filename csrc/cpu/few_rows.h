// Forward of a few rows of queries, where packing K and V would cost more than the products.
#pragma once

#include "matmul.h"
#include "softmax.h"

namespace jax_flash::JF_ISA {

inline constexpr int32_t kFewRows = 2 * kBlockRows;

class FewRows {
 public:
  FewRows(const Problem& p, const RowTile* tile, int32_t, float* memory)
      : problem_(p),
        head_(p, tile->leading, tile->sequence, tile->head),
        tile_(*tile),
        rows_(tile->rows()),
        blocks_(round_up(rows_, kBlockRows) / kBlockRows) {
    const int32_t ld = padded(p.head_dim), ldv = padded(p.value_dim);
    Scratch scratch{memory};
    q_ = scratch.take(kFewRows * ld);
    s_ = scratch.take(kFewRows * kTileN);
    o_ = scratch.take(kFewRows * ldv);
    keys_ = scratch.take(kTileN * (ld > ldv ? ld : ldv));
    const char* at[kTileM] = {};
    query_addresses(head_, tile_, at);
    gather_rows(at, rows_, blocks_ * kBlockRows, head_.query, head_.query_sign, q_);
  }

  Interval visible() const { return head_.band.rows(tile_.begin, tile_.end); }

  // The softmax state and O over keys [keys.lo, keys.hi).
  void attend(Interval keys) {
    const int32_t dv = problem_.value_dim;
    state_.reset();
    fill(o_, blocks_ * kBlockRows * padded(dv), 0.0f);
    for (int32_t j0 = round_down(keys.lo, kPanel); j0 < keys.hi; j0 += kTileN) {
      const KeyRange range{intersect(keys, {j0, j0 + kTileN}), j0};
      const int32_t n = range.keys.hi - j0;
      BlockColumns blocks[kMaxBlocks];
      if (!block_columns(head_.band, tile_.begin, blocks_, tile_.heads, range, blocks)) continue;
      load_rows(head_.key, j0, j0 + n, round_up(n, kLanes), 1.0f, keys_);
      multiply_few(q_, rows_, keys_, n, problem_.head_dim, s_);  // S = Q Kᵀ
      Columns used[kMaxBlocks];
      for (int32_t b = 0; b < blocks_; ++b) {
        used[b] = blocks[b].used;
        blocks[b].open = {blocks[b].panels().lo, blocks[b].panels().lo};
      }
      for (int32_t r = 0; r < rows_; ++r) {
        const BlockColumns& block = blocks[r / kBlockRows];
        if (block.used.empty()) continue;
        softmax_row<F32>(head_, {tile_.position(r), tile_.head_of(r)}, range, block, s_ + r * kTileN,
                         broadcast(kNegInf), state_, r);
      }
      load_rows(head_.value, j0, j0 + n, n, 1.0f, keys_);
      multiply_values<Start::kRescale, false>(s_, keys_, n, dv, used, blocks_, o_,
                                              state_.alpha);  // O ← αO + P V
    }
  }

  const Head& head() const { return head_; }
  float* o(int32_t = 0) { return o_; }
  Softmax& state(int32_t = 0) { return state_; }

 private:
  const Problem& problem_;
  Head head_;
  const RowTile& tile_;
  int32_t rows_, blocks_;
  float *q_, *s_, *o_, *keys_;
  Softmax state_;
};

}  // namespace jax_flash::JF_ISA
