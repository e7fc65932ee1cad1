// Forward of query tiles: online softmax over tiles of the visible keys, in one pass or in parts that are
// merged afterwards.
#pragma once

#include "decode.h"
#include "hidden.h"
#include "softmax.h"

namespace jax_flash::JF_ISA {

// Scratch, in floats: packed K and V, S, and for every query tile Q, O and the softmax state.
constexpr int64_t forward_floats(int64_t d, int64_t dv) {
  return kTileN * (d + dv) + kTileM * (kTileN + kLanes) +
         kMaxQueryTiles * (kTileM * (d + dv) + static_cast<int64_t>(sizeof(Softmax) / 4) + kLanes);
}
static_assert(forward_floats(kMaxLatentDim, kMaxHeadDim) <= kScratchFloats);

// A tile of keys, packed as operand B of both products. Column 0 is key range.begin.
struct PackedKeys {
  KeyRange range;
  Word *k, *v;
  NonFiniteKeys non_finite;

  JF_HD int32_t size() const { return range.keys.hi - range.begin; }
};

// A tile of queries during its loop over the keys. O is [count, padded(dv)], not yet divided by l.
struct QueryRows {
  const RowTile* tile;
  RowSegments segments;
  Interval keys;  // keys of the current tile that segments, ranges and masks leave
  int32_t rows, blocks;
  Word* q;
  float* o;
  Softmax* state;
};

// The row stride of S. It is no power of two, so that the rows of a block fall into different cache sets.
inline constexpr int32_t kScoreRow = kTileN + kLanes;

// The packed operands of a product over features, C[rows, keys] = A B. Rows of A are lda words apart, panels
// of B `panel` words.
struct ScoreOperands {
  const Word* a;
  int64_t lda;
  const Word* b;
  int64_t panel;
  int32_t depth;
};

// A bit per panel of a tile of keys, for a block of rows: in `used` if a row may see a column of the panel,
// in `unmasked` if every row sees them all, whatever the score options.
struct BlockPanels {
  uint64_t used, unmasked;

  static void of_blocks(const BlockColumns* columns, int32_t blocks, BlockPanels* to) {
    for (int32_t i = 0; i < blocks; ++i) {
      const BlockColumns& x = columns[i];
      to[i].used = x.seen & panel_bits(x.used.lo, x.used.hi);
      to[i].unmasked = panel_bits(x.unmasked.lo, x.unmasked.hi) & ~x.mixed;
    }
  }
};

// Panel `panel` of C for the blocks of rows that see one of its columns; rows of C are ldc apart. Unmasked
// panels also update lane_max, the row maximum lane by lane, unless it is null.
template <class E>
static void multiply_score_panel(const ScoreOperands& x, int32_t panel, int32_t blocks,
                                 const BlockPanels* panels, float* c, int32_t ldc, Float* lane_max) {
  const Word* const b = x.b + panel * x.panel;
  for (int32_t i = 0; i < blocks; ++i) {
    if (!(panels[i].used >> panel & 1)) continue;
    const Word* const a = x.a + i * kBlockRows * x.lda;
    float* const to = c + i * kBlockRows * ldc + panel * kPanel;
    if (lane_max && panels[i].unmasked >> panel & 1) {
      multiply_words<E, Start::kZero, false, true>(a, x.lda, b, x.depth, to, ldc,
                                                   {.lane_max = lane_max + i * kBlockRows});
    } else {
      multiply_words<E, Start::kZero>(a, x.lda, b, x.depth, to, ldc, {});
    }
  }
}

// The packed operands of a product over n keys: rows of P, p_row words apart, and V in panels.
struct ValueOperands {
  const float* p;
  int32_t p_row;
  const Word* v;
  int32_t n;
};

// O ← αO + P V over the visible columns; kAccumulate: α = 1.
template <class E, Start start>
static void multiply_values(const ValueOperands& x, int32_t blocks, const BlockColumns* columns, int32_t dv,
                            float* o, const float* alpha) {
  const int32_t ld = padded(dv), depth = depth_words<E>(x.n);
  for (int32_t j = 0; j < ld; j += kPanel) {
    for (int32_t i = 0; i < blocks; ++i) {
      const BlockColumns& block = columns[i];
      if (block.used.empty()) continue;
      const auto multiply = [&]<Start begin>(Columns used) {
        const int32_t k = used.lo / E::kPair;
        const Word* p = reinterpret_cast<const Word*>(x.p + i * kBlockRows * x.p_row) + k;
        multiply_words<E, begin>(p, x.p_row, x.v + (int64_t{j} * depth + k * kPanel),
                                 depth_words<E>(used.hi) - k, o + i * kBlockRows * ld + j, ld,
                                 {.alpha = begin == Start::kRescale ? alpha + i * kBlockRows : nullptr});
      };
      const Columns first = next_run(block.panels(), block.seen, block.panels().lo);
      multiply.template operator()<start>(intersect(first, block.used));
      for (Columns run = first; run = next_run(block.panels(), block.seen, run.hi), !run.empty();) {
        multiply.template operator()<Start::kAccumulate>(intersect(run, block.used));
      }
    }
  }
}

// One step of the online softmax: a tile of queries attends to one tile of keys.
template <class E>
static void attend_keys(const Head& head, const QueryRows& t, const PackedKeys& keys, float* s) {
  const Problem& p = head.problem;
  BlockColumns columns[kMaxBlocks];
  const KeyRange range{t.keys, keys.range.begin};
  if (!block_columns(head, *t.tile, t.blocks, range, columns)) return;
  Float lane_max[kTileM];
  for (int32_t r = 0; r < t.blocks * kBlockRows; ++r) lane_max[r] = broadcast(kNegInf);
  const int32_t ld = row_words<E>(p.head_dim);
  const ScoreOperands scores_of{t.q, ld, keys.k, panel_words<E>(p.head_dim), depth_words<E>(p.head_dim)};
  BlockPanels panels[kMaxBlocks];
  BlockPanels::of_blocks(columns, t.blocks, panels);
  for (int32_t j = 0; j < keys.size(); j += kPanel) {
    multiply_score_panel<E>(scores_of, j / kPanel, t.blocks, panels, s, kScoreRow,
                            head.has_options ? nullptr : lane_max);  // S = Q Kᵀ
  }
  // The maxima of all rows come first: each waits on a chain of lane reductions, and the chains of
  // successive rows overlap.
  SoftmaxShift shifts;
  const auto of_rows = [&](auto step) {
    for (int32_t r = 0; r < t.rows; ++r) {
      const BlockColumns& block = columns[r / kBlockRows];
      if (!block.used.empty())
        step(r, Row{t.tile->position(r), t.tile->head_of(r)}, block, s + r * kScoreRow);
    }
  };
  of_rows([&](int32_t r, Row row, const BlockColumns& block, float* scores) {
    softmax_maximum(head, row, keys.range, block, scores, lane_max[r], *t.state, shifts, r);
  });
  softmax_rescale<E>(t.rows, shifts, *t.state);
  of_rows([&](int32_t r, Row row, const BlockColumns& block, float* scores) {
    softmax_row<E>(head, row, keys.range.begin, block, scores, shifts.shift[r], *t.state, r);
  });
  multiply_values<E, Start::kRescale>({s, kScoreRow, keys.v, keys.size()}, t.blocks, columns, p.value_dim,
                                      t.o, t.state->alpha);
  add_non_finite_keys<E>(
      head, keys.non_finite, keys.range.begin, t.rows,
      [&](int32_t r) { return Row{t.tile->position(r), t.tile->head_of(r)}; },
      [&](int32_t) { return head.value; }, s, kScoreRow, t.o, padded(p.value_dim));
}

// Runs up to kMaxQueryTiles query tiles of one KV head together over the keys, so that every tile of keys
// is packed once for all of them.
template <class E>
class ForwardLoop {
 public:
  ForwardLoop(const Problem& p, const RowTile* tiles, int32_t count, float* memory)
      : problem_(p), head_(p, tiles[0].leading, tiles[0].sequence, tiles[0].head), count_(count) {
    const RowTile &first = tiles[0], &last = tiles[count - 1];
    visible_ = head_.seen_by_any({min(first.begin, last.begin), max(first.end, last.end), first.heads});
    Scratch scratch{memory};
    keys_.k = words(scratch, kTileN, p.head_dim);
    keys_.v = words(scratch, kTileN, p.value_dim);
    s_ = scratch.take(kTileM * kScoreRow);
    for (int32_t i = 0; i < count; ++i) {
      tiles_[i].tile = tiles + i;
      tiles_[i].segments = RowSegments(head_, tiles[i].begin, tiles[i].end);
      tiles_[i].rows = tiles[i].rows();
      tiles_[i].blocks = round_up(tiles_[i].rows, kBlockRows) / kBlockRows;
      tiles_[i].q = words(scratch, kTileM, p.head_dim);
      tiles_[i].o = scratch.take(kTileM * padded(p.value_dim));
      tiles_[i].state = reinterpret_cast<Softmax*>(scratch.take(sizeof(Softmax) / sizeof(float)));
      const char* at[kTileM] = {};
      query_addresses(head_, tiles[i], head_.query, p.query.head, at);
      pack_rows<E>(at, tiles_[i].rows, tiles_[i].blocks * kBlockRows, head_.query, head_.query_sign,
                   tiles_[i].q, row_words<E>(p.head_dim));
    }
  }

  // Computes the softmax states and O of all tiles over keys [keys.lo, keys.hi).
  void attend(Interval keys) {
    attend_once(keys, false);
    bool nan = false;
    for (int32_t i = 0; i < count_; ++i)
      nan |= has_nan(tiles_[i].o, tiles_[i].rows * padded(problem_.value_dim));
    if (nan) attend_once(keys, true);
  }

  Interval visible() const { return visible_; }

  const Head& head() const { return head_; }
  float* o(int32_t i = 0) { return tiles_[i].o; }
  Softmax& state(int32_t i = 0) { return *tiles_[i].state; }

 private:
  // separate_non_finite: keys that are not finite are added one by one (hidden.h).
  void attend_once(Interval keys, bool separate_non_finite) {
    keys_.non_finite.count = 0;
    for (int32_t i = 0; i < count_; ++i) {
      tiles_[i].state->reset();
      fill(tiles_[i].o, tiles_[i].blocks * kBlockRows * padded(problem_.value_dim), 0.0f);
    }
    // Tiles of keys always begin at multiples of kTileN, so that the choice of query tiles that run together
    // changes no bit of the result.
    for (int32_t j0 = round_down(keys.lo, kTileN); j0 < keys.hi; j0 += kTileN) {
      const Interval tile = trim_to_seen(head_, tiles_, count_, intersect(keys, {j0, j0 + kTileN}));
      if (tile.empty()) continue;
      pack(tile, separate_non_finite);
      for (int32_t i = 0; i < count_; ++i) attend_keys<E>(head_, tiles_[i], keys_, s_);
    }
  }

  static Word* words(Scratch& scratch, int32_t rows, int32_t width) {
    return reinterpret_cast<Word*>(scratch.take(int64_t{rows} * row_words<E>(width)));
  }

  void pack(Interval keys, bool separate_non_finite) {
    keys_.range = {keys, round_down(keys.lo, kPanel)};
    const int32_t begin = keys_.range.begin, n = keys_.size();
    const char* at[kTileN];
    float factors[kTileN];
    head_.key.addresses(begin, n, at);
    pack_transposed<E>(at, n, head_.key.with_row_factors(begin, n, factors), keys_.k,
                       panel_words<E>(problem_.head_dim));
    head_.value.addresses(begin, n, at);
    if (separate_non_finite) keys_.non_finite.find(1, [&](int32_t) { return head_.value; }, begin, n, at);
    pack_columns<E>(at, n, head_.value.with_row_factors(begin, n, factors), keys_.v);
  }

  const Problem& problem_;
  Head head_;
  int32_t count_;
  Interval visible_;  // the union of the keys that the tiles see
  PackedKeys keys_;
  float* s_;
  QueryRows tiles_[kMaxQueryTiles];
};

// out and lse of `count` tiles of one KV head whose keys are not split into parts.
template <class Loop>
static void forward_whole(const Problem& p, const RowTile* tiles, int32_t count, float* memory) {
  Loop loop(p, tiles, count, memory);
  loop.attend(loop.visible());
  for (int32_t i = 0; i < count; ++i) {
    alignas(64) float l[kTileM];
    Softmax& state = loop.state(i);
    for (int32_t r = 0; r < tiles[i].rows(); ++r) l[r] = reduce_sum(state.l[r]);
    store_output(loop.head(), tiles[i], {loop.o(i), state.m, l});
  }
}

template <class Loop>
static void forward_part_of(const Problem& p, const RowTile& tile, int32_t part, float* to, float* memory) {
  Loop loop(p, &tile, 1, memory);
  loop.attend(split_part(loop.visible(), part, tile.parts));
  PartialOutput::at(to, tile.rows(), p.value_dim).assign(tile.rows(), p.value_dim, loop.o(), loop.state());
}

template <class Loop>
struct LoopType {};

// Calls use(LoopType<Loop>()) with the loop for the tile's number of rows and the dtype.
template <class Use>
JF_INLINE void with_loop([[maybe_unused]] const Problem& p, const RowTile& tile, Use use) {
  const bool decode = is_decode(p, tile);
#if defined(__AVX512BF16__)
  // Over pages the sequence's own length counts, since k_rows is the width of its table.
  if (uses_bf16_pairs(p, p.paged() ? tile.sequence.k_len : p.k_rows)) {
    if (!decode && p.kv_dtype == DType::kBF16) return use(LoopType<ForwardLoop<BF16>>());
    if (decode && p.head_dim % kPanel == 0 && p.value_dim % kPanel == 0)
      return use(LoopType<DecodeLoop<BF16>>());
  }
#endif
  if (decode) return use(LoopType<DecodeLoop<F32>>());
  use(LoopType<ForwardLoop<F32>>());
}

static void forward(const Problem& p, const RowTile* tiles, int32_t count, float* memory) {
  with_loop(p, tiles[0], [&]<class Loop>(LoopType<Loop>) { forward_whole<Loop>(p, tiles, count, memory); });
}

static int64_t part_floats(const Problem& p, const RowTile& tile) {
  return (PartialOutput::floats(tile.rows(), p.value_dim) + kLanes - 1) / kLanes * kLanes;
}

static void forward_part(const Problem& p, const RowTile& tile, int32_t part, float* to, float* memory) {
  with_loop(p, tile, [&]<class Loop>(LoopType<Loop>) { forward_part_of<Loop>(p, tile, part, to, memory); });
}

// first ← the partial output over the keys of both parts.
static void merge_parts(const Problem& p, const RowTile& tile, float* first, float* other) {
  const int32_t rows = tile.rows(), dv = p.value_dim;
  merge_part(rows, dv, softmax_scale_of(p), PartialOutput::at(first, rows, dv),
             PartialOutput::at(other, rows, dv));
}

static void store_part(const Problem& p, const RowTile& tile, float* part) {
  store_output(Head(p, tile.leading, tile.sequence, tile.head), tile,
               PartialOutput::at(part, tile.rows(), p.value_dim));
}

}  // namespace jax_flash::JF_ISA
