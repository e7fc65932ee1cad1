// What the query rows of a column see of a sequence: its keys, tiles of keys, and the operands of masks.
#pragma once

#include <cstdint>

#include "core/band.h"
#include "core/visible/blocks.h"
#include "core/visible/elements.h"
#include "core/visible/ranges.h"
#include "cuda/decode/call.cuh"
#include "cuda/work.cuh"

namespace jax_flash::decode {

struct SequenceWork;

// The query rows of a column. Row r is at position (first + r) / group, of query head
// kv_head · group + (first + r) % group. Rows whose position is past the sequence's queries are padding.
struct ColumnRows {
  static constexpr bool kSkips = false;  // whether tiles between the first and the last may be skipped
  const Divisor& group;
  int32_t kv_head, first, end;

  // block_rows: query rows of a column.
  __device__ __forceinline__ static ColumnRows of_column(const DecodeCall& call, int32_t column,
                                                         int32_t block_rows) {
    const int32_t kv_head = call.chunks.quotient(column);
    const int32_t first = (column - kv_head * call.chunks.value) * block_rows;
    return {call.group, kv_head, first, min(call.rows, first + block_rows)};
  }
  __device__ __forceinline__ int32_t count() const { return end - first; }
  __device__ __forceinline__ int32_t position(int32_t row) const { return group.quotient(first + row); }
  __device__ __forceinline__ int32_t head(int32_t row) const {
    return kv_head * group.value + group.remainder(first + row);
  }
  __device__ __forceinline__ int32_t first_position() const { return group.quotient(first); }
  __device__ __forceinline__ int32_t end_position() const { return group.quotient(end - 1) + 1; }
  __device__ __forceinline__ SequenceWork sequence(const DecodeCall& call, int32_t number) const;
};

// One sequence of one leading entry, as the rows of a column see it.
struct SequenceWork {
  int32_t leading, index;  // index: the batch entry or sequence
  int32_t batch_row;       // the batch index of per-token operands
  int32_t q_begin;
  Band band;
  Interval keys;          // from the first to the last key that at least one of the rows sees
  Interval gap = {0, 0};  // between them, where ranges hide all keys from all rows
  int32_t list = -1;      // the number of the list of its key tiles (DecodeLists); -1: it has none

  SequenceWork() = default;
  // `number` counts the sequences of all leading entries.
  __device__ __forceinline__ SequenceWork(const DecodeCall& call, const ColumnRows& rows, int32_t number) {
    leading = call.sequences == call.batch.value ? 0 : call.batch.quotient(number);
    index = batch_row = number - leading * call.batch.value;
    q_begin = 0;
    bool served = true;
    int32_t q_len = call.q_rows;
    if (call.starts) {
      const int32_t* const start = call.starts.at<const int32_t>(leading, index, 0, 0);
      q_begin = start[0], q_len = start[call.starts.batch] - q_begin, batch_row = 0;
      served = call.grid.takes(q_len, call.group.value) && rows.first_position() < q_len;
    } else if (call.q_lengths) {
      q_len = clamp_index(*call.q_lengths.at<const int32_t>(leading, index, 0, 0), q_len);
    }
    int32_t k_len = call.k_rows;
    if (call.kv_lengths) k_len = clamp_index(*call.kv_lengths.at<const int32_t>(leading, index, 0, 0), k_len);
    band = {q_len, k_len, call.bottom_right ? k_len - q_len : 0, call.left, call.right};
    if (call.moves_band) move_band(call);
    keys = band.rows(rows.first_position(), rows.end_position());
    if (!served) leave();
  }
  __device__ __forceinline__ void move_band(const DecodeCall& call) {
    const auto element = [&](const DecodeView& view) {
      return int64_t{*view.at<const int32_t>(leading, index, 0, 0)};
    };
    if (call.position) {
      const int32_t* const first = call.position.at<const int32_t>(leading, 0, 0, 0);
      band.shift += int64_t{first[0]} - first[call.position.row];
    }
    if (call.window_offset) band.shift += element(call.window_offset);
    if (call.window_left) band.left = element(call.window_left);
    if (call.window_right) band.right = element(call.window_right);
  }
  // Leaves the sequence to the forward kernel.
  __device__ __forceinline__ void leave() { keys = {0, -1}; }
  __device__ __forceinline__ bool served() const { return keys.hi >= 0; }
  // Keeps to the tiles and the keys of a list.
  __device__ __forceinline__ void take_list(const DecodeCall& call, int32_t number) {
    list = number;
    if (served()) keys = call.lists.keys[number];
  }
  __device__ __forceinline__ int32_t end_position(const ColumnRows& rows) const {
    return min(rows.end_position(), band.q_len);
  }
};

__device__ __forceinline__ SequenceWork ColumnRows::sequence(const DecodeCall& call, int32_t number) const {
  return {call, *this, number};
}

// The query of a row of the column. Padding rows repeat other rows, which is harmless as rows are
// independent.
template <class T>
__device__ __forceinline__ const T* query_at(const DecodeCall& call, const ColumnRows& rows,
                                             const SequenceWork& work, int32_t row) {
  row = min(row, rows.count() - 1);
  const int32_t position = call.starts ? min(rows.position(row), work.band.q_len - 1) : rows.position(row);
  return call.query.at<const T>(work.leading, work.batch_row, rows.head(row), work.q_begin + position);
}

// The draft mask of a sequence; one without elements if it has none.
__device__ __forceinline__ ElementMask draft_mask_of(const DecodeCall& call, const SequenceWork& work) {
  const int32_t q_len = work.band.q_len;
  if (!call.draft_mask || !has_drafts(q_len, call.draft_rows)) return {};
  return {call.draft_mask.at<const uint8_t>(work.leading, work.index, 0, 0), call.draft_mask.row,
          first_draft(q_len, work.band.k_len)};
}

// The block mask of a sequence, from the first query head on; it hides nothing if the call has none.
__device__ __forceinline__ BlockMask block_mask_of(const DecodeCall& call, const SequenceWork& work) {
  if (!call.block_mask) return {};
  BlockMask mask{call.block_mask.at<const uint8_t>(work.leading, work.index, 0, 0),
                 call.block_mask.head,
                 call.block_mask.row,
                 call.mask_rows,
                 call.mask_columns,
                 call.block_rows.value,
                 call.block_keys.value};
  if (call.starts && mask.block_rows == 1) mask.first_row = work.q_begin;
  if (call.position) {
    const int32_t* const first = call.position.at<const int32_t>(work.leading, 0, 0, 0);
    mask.begin_at(first[0], first[call.position.row]);
  }
  return mask;
}

// The keys among `keys` that the ranges of a row of the column show.
__device__ __forceinline__ SeenKeys seen_by_ranges(const DecodeCall& call, const ColumnRows& rows,
                                                   const SequenceWork& work, int32_t row, Interval keys) {
  const int32_t position = min(rows.position(row), (call.starts ? work.band.q_len : call.q_rows) - 1);
  const int32_t* const limits =
      call.ranges.at<const int32_t>(work.leading, work.batch_row, rows.head(row), work.q_begin + position);
  return RowRanges{limits, 0, 0, call.two_ranges}.seen(0, 0, keys);
}

// The keys that ranges leave to any and to all of the rows.
__device__ __forceinline__ SeenByRows seen_by_column(const DecodeCall& call, const ColumnRows& rows,
                                                     const SequenceWork& work) {
  const int32_t* const limits = call.ranges.at<const int32_t>(work.leading, work.batch_row,
                                                              rows.kv_head * rows.group.value, work.q_begin);
  return seen_by_rows(work.band, RowRanges{limits, call.ranges.head, call.ranges.row, call.two_ranges},
                      {rows.first_position(), rows.end_position(), rows.group.value}, work.keys);
}

// Keeps to the keys that ranges leave to the rows.
__device__ __forceinline__ void skip_hidden_keys(const DecodeCall& call, const ColumnRows& rows,
                                                 SequenceWork& work) {
  if (!call.ranges) return;
  const SeenByRows seen = seen_by_column(call, rows, work);
  work.keys = seen.any, work.gap = seen.gap;
}

// The rows of a column in a kernel with score options, which skips tiles that ranges or a block mask hide
// from all rows.
struct RowsWithOptions : ColumnRows {
  static constexpr bool kSkips = true;
  int32_t chunk;  // of the query rows of the KV head

  __device__ __forceinline__ static RowsWithOptions of_column(const DecodeCall& call, int32_t column,
                                                              int32_t block_rows) {
    const ColumnRows rows = ColumnRows::of_column(call, column, block_rows);
    return {rows, column - rows.kv_head * call.chunks.value};
  }
  __device__ __forceinline__ SequenceWork sequence(const DecodeCall& call, int32_t number) const {
    SequenceWork work = ColumnRows::sequence(call, number);
    if (call.lists) {
      work.take_list(call, call.lists.number(kv_head, chunk, number));
    } else {
      skip_hidden_keys(call, *this, work);
    }
    return work;
  }
};

// The tile of kTile keys that is element n of list `list`; tile n if that is −1, or there are no lists. Past
// the list's end it is a tile past every key, since a sequence without keys counts as one tile.
template <int kTile, bool kLists>
__device__ __forceinline__ ListedTile listed_tile(const DecodeCall& call, int32_t list, int32_t n) {
  if (!kLists || list < 0) return {n};
  if (n >= call.lists.counts[list]) return {INT32_MAX / kTile - 1};
  return ListedTile::of(call.lists.tiles[int64_t{list} * call.lists.most + n]);
}

// The tiles of kTile keys of a sequence, counted without those that no row sees. kSkips: whether there may be
// any of these between the first and the last that a row sees.
template <int kTile, bool kSkips = true>
struct SeenTiles {
  const DecodeCall& call;
  const SequenceWork& work;

  __device__ __forceinline__ Interval all() const {
    if (work.list >= 0) return {0, call.lists.counts[work.list]};
    return gap().close(tiles_of(work.keys, kTile));
  }
  // The n-th of them.
  __device__ __forceinline__ ListedTile at(int32_t n) const {
    return listed_tile<kTile, kSkips>(call, work.list, work.list < 0 ? gap().tile(n) : n);
  }

 private:
  __device__ __forceinline__ GapOfTiles<kSkips> gap() const {
    GapOfTiles<kSkips> gap;
    gap.set_gap(work.gap, kTile);
    return gap;
  }
};

}  // namespace jax_flash::decode
