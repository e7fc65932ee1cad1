// Kernel parameters of decode. A kernel's parameters and its code are fetched from memory when it starts,
// which takes much of a short call's time. So there are few parameters, and divisions are replaced by
// products.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <limits>

#include "core/divisor.h"
#include "core/plan/launch_plan.h"
#include "core/problem.h"
#include "core/visible/listed_tiles.h"
#include "cuda/decode/units.h"

namespace jax_flash::decode {

// A View with at most one leading dimension.
struct DecodeView {
  void* data = nullptr;
  int64_t leading = 0, batch = 0, head = 0, row = 0;  // strides in elements

  __device__ __forceinline__ explicit operator bool() const { return data != nullptr; }
  // Element (leading entry, b, h, i).
  template <class T>
  __device__ __forceinline__ T* at(int32_t entry, int64_t b, int32_t h, int64_t i) const {
    return static_cast<T*>(data) + (entry * leading + b * batch + h * head + i * row);
  }
};

// The lists of a call (core/visible/listed_tiles.h): for each column and sequence, tiles in ascending order.
struct DecodeLists {
  Interval* keys = nullptr;   // from the first to the last key that a row sees; null: the call has no lists
  int32_t* counts = nullptr;  // tiles of each list
  uint32_t* tiles = nullptr;  // ListedTile::packed()
  int32_t most = 0;           // capacity of a list
  int32_t columns = 0;        // columns with lists of their own
  int32_t of_head = 0;        // of each KV head; 0: all KV heads share the lists of one
  int32_t sequences = 0;

  JF_HD explicit operator bool() const { return keys != nullptr; }
  // The number of a list. chunk: of the query rows of the KV head.
  JF_HD int32_t number(int32_t kv_head, int32_t chunk, int32_t sequence) const {
    return (kv_head * of_head + chunk) * sequences + sequence;
  }
};

// Kernel parameters.
struct DecodeCall {
  DecodeView query, key, value, out, lse;
  DecodeView q_lengths, kv_lengths, block_tables;
  DecodeView alibi_slopes, sinks, k_scale, v_scale;
  DecodeView draft_mask;
  DecodeView starts;  // packed sequences: the first row of each, and the end of the last one
  DecodeGrid grid;
  int32_t sequences;  // sequences of all leading entries together
  Divisor batch, columns, chunks, group, page_size;
  int32_t rows;       // query rows of a KV head
  int32_t end_tiles;  // the tiles that the end of a sequence counts as (units.h)
  int32_t q_rows, k_rows, head_dim, value_dim, pages, draft_rows;
  bool paged;
  bool scaled_by_page;  // float8: each page has a scale
  bool evicts_first;    // L2 evicts the keys first, because they exceed it
  bool same_lengths;    // the host knows that all sequences have the same work; if so:
  Partition partition;  // the partition of every column
  Divisor units;        // the units of every sequence
  bool bottom_right, moves_band;
  int32_t compared;     // the first sequences, whose numbers of keys stand for all (compared_sequences)
  int64_t left, right;  // keys before and after the diagonal
  float scale, softcap;
  DType kv_dtype;
  void* workspace;
  DecodeView ranges;
  bool two_ranges;    // each row has two ranges
  uint32_t* row_max;  // in the layout of lse; null if the call does not ask for it
  // Operands that move the band; moves_band says whether there is one.
  DecodeView position;  // element 0: the first query's position; element `row`: the first key's
  DecodeView window_left, window_right, window_offset;
  DecodeView block_mask;  // the operand, or a boolean mask, whose blocks are single rows and keys
  int32_t mask_rows, mask_columns;
  Divisor block_rows, block_keys;
  DecodeLists lists;
};

// The number of launches: entries of all leading dimensions but the last.
inline int64_t outer_entries(const Leading& leading) {
  int64_t n = 1;
  for (int i = 0; i + 1 < leading.rank; ++i) n *= leading.size[i];
  return n;
}

// Whether a call has score options.
inline bool has_options(const Problem& p) {
  return p.spec.softcap > 0 || p.alibi_slopes || p.draft_mask || p.ranges || p.block_mask || p.mask;
}

// Whether each page of a float8 pool has a scale; the kernel treats these scales as score options.
inline bool scaled_by_page(const Problem& p) { return p.k_scale.batch != 0 || p.v_scale.batch != 0; }

// Whether the keys and values that a call may see exceed L2, so that keeping them there is of no use.
inline bool exceeds_l2(const Problem& p) {
  constexpr double kL2 = 64e6;  // bytes
  const int64_t keys =
      p.spec.left < 0 ? p.k_rows : std::min<int64_t>(p.k_rows, int64_t{p.spec.left} + p.q_rows);
  const int64_t row = int64_t{p.kv_heads} * (p.head_dim + p.value_dim) * size_of(p.kv_dtype);
  return static_cast<double>(keys) * static_cast<double>(p.batch) * static_cast<double>(row) > kL2;
}

// How many sequences clusters have to look at to know whether all see about equally many keys: none if the
// host knows, one if an operand has the same element for all.
inline int32_t compared_sequences(const DecodeCall& call) {
  bool any = false, shared = true;
  for (const DecodeView& view :
       {call.kv_lengths, call.position, call.window_left, call.window_right, call.window_offset}) {
    any = any || view.data;
    shared = shared && (!view.data || (view.leading == 0 && view.batch == 0));
  }
  return !any ? 0 : shared ? std::min(1, call.sequences) : call.sequences;
}

// Fills in the operand block_mask or mask; keys that a mask broadcasts are one block.
inline void set_block_mask(const Problem& p, const DecodeView& mask, DecodeCall& call) {
  call.block_mask = mask;
  if (p.block_mask) {
    call.mask_rows = p.mask_rows, call.mask_columns = p.mask_columns;
    call.block_rows = Divisor(p.spec.block_rows), call.block_keys = Divisor(p.spec.block_keys);
  } else if (p.mask) {
    constexpr int32_t kAllKeys = std::numeric_limits<int32_t>::max();
    call.mask_rows = p.q_rows, call.mask_columns = p.mask.column ? p.k_rows : 1;
    call.block_keys = Divisor(p.mask.column ? 1 : kAllKeys);
  }
}

// The lists of tiles of `tile` keys, of `columns` columns, `of_head` of each KV head. call.sequences must be
// set.
inline DecodeLists decode_lists(const DecodeCall& call, int32_t tile, int32_t columns, int32_t of_head) {
  if (call.grid.lists < 0) return {};
  const bool shared = call.block_mask.head == 0 && call.ranges.head == 0;
  DecodeLists lists;
  lists.columns = shared ? of_head : columns, lists.of_head = shared ? 0 : of_head;
  lists.sequences = call.sequences, lists.most = static_cast<int32_t>(ceil_div(call.k_rows, tile));
  const int64_t all = int64_t{lists.columns} * lists.sequences;
  lists.keys = reinterpret_cast<Interval*>(static_cast<char*>(call.workspace) + call.grid.lists);
  lists.counts = reinterpret_cast<int32_t*>(lists.keys + all);
  lists.tiles = reinterpret_cast<uint32_t*>(lists.counts + all);
  return lists;
}

// Makes the lists of a call, if it has any. block_rows: query rows of a column; tile: keys of a tile.
cudaError_t launch_decode_lists(const DecodeCall& call, int32_t block_rows, int32_t tile,
                                cudaStream_t stream);

// The call for outer entry `outer`. block_rows: query rows of a column (DecodeGrid).
template <int kTile>
DecodeCall make_call(const Problem& p, const DecodeGrid& grid, int32_t block_rows, int64_t outer,
                     void* workspace) {
  const int last = p.leading.rank - 1;
  const int64_t inner = last < 0 ? 1 : p.leading.size[last];
  const auto view = [&](const View& v, int64_t element_size, int64_t row) {
    if (!v) return DecodeView{};
    const int64_t offset = v.leading_offset(p.leading, outer * inner) * element_size;
    return DecodeView{static_cast<uint8_t*>(v.data) + offset, last < 0 ? 0 : v.leading[last], v.batch, v.head,
                      row};
  };
  const auto rows_of = [&](const View& v, DType dtype) { return view(v, size_of(dtype), v.row); };
  const auto words = [&](const View& v) { return view(v, 4, v.row); };
  constexpr int64_t kUnbounded = int64_t{1} << 40;
  const int32_t group = p.heads / p.kv_heads;
  DecodeCall call{};
  call.query = rows_of(p.query, p.dtype), call.out = rows_of(p.out, p.dtype);
  call.key = rows_of(p.key, p.kv_dtype), call.value = rows_of(p.value, p.kv_dtype);
  call.lse = words(p.lse), call.alibi_slopes = words(p.alibi_slopes), call.sinks = words(p.sinks);
  call.q_lengths = words(p.q_lengths), call.kv_lengths = words(p.kv_lengths);
  call.block_tables = words(p.block_tables);
  call.k_scale = words(p.k_scale), call.v_scale = words(p.v_scale);
  call.draft_mask = view(p.draft_mask, 1, p.draft_mask.row), call.draft_rows = p.draft_rows;
  call.scaled_by_page = scaled_by_page(p);
  call.starts = words(p.cu_seqlens_q);
  call.grid = grid;
  call.sequences = static_cast<int32_t>(inner * p.batch);
  call.rows = p.packed() ? grid.packed_rows : p.q_rows * group;
  call.end_tiles = end_tiles(grid, call.sequences);
  call.batch = Divisor(p.batch), call.columns = Divisor(grid.columns), call.group = Divisor(group);
  call.chunks = Divisor(ceil_div(call.rows, block_rows));
  call.page_size = Divisor(p.paged() ? p.page_size : 1);
  call.q_rows = p.q_rows, call.k_rows = p.k_rows, call.head_dim = p.head_dim, call.value_dim = p.value_dim;
  call.pages = p.paged() ? p.pages : std::numeric_limits<int32_t>::max(), call.paged = p.paged();
  call.evicts_first = exceeds_l2(p);
  call.same_lengths = !p.q_lengths && !p.kv_lengths && !p.spec.moves_band() && !p.ranges && grid.lists < 0 &&
                      !p.packed() && call.chunks.value == 1;
  call.bottom_right = p.spec.align == Align::kBottomRight;
  call.left = p.spec.left < 0 ? kUnbounded : p.spec.left;
  call.right = p.spec.right < 0 ? kUnbounded : p.spec.right;
  call.scale = p.spec.scale, call.softcap = p.spec.softcap;
  call.kv_dtype = p.kv_dtype;
  call.workspace = workspace;
  call.ranges = words(p.ranges), call.two_ranges = p.limits == 4;
  call.row_max = static_cast<uint32_t*>(words(p.row_max).data);
  call.moves_band = p.spec.moves_band();
  call.position = view(p.position, 4, p.position.column);
  call.window_left = words(p.window_left), call.window_right = words(p.window_right);
  call.window_offset = words(p.window_offset);
  call.compared = compared_sequences(call);
  const View& mask = p.block_mask ? p.block_mask : p.mask;
  set_block_mask(p, view(mask, 1, mask.row), call);
  call.lists = decode_lists(call, kTile, call.columns.value, call.chunks.value);
  if (call.same_lengths) {
    const Band band = make_band(p.spec, {0, 0, 0, 0, p.q_rows, p.k_rows});
    const Interval tiles = tiles_of(band.rows(0, p.q_rows), kTile);
    const int32_t units = SequenceUnits(grid, call.end_tiles, tiles, true).units;
    call.units = Divisor(units),
    call.partition = Partition(grid, call.sequences, call.sequences * units, units);
  }
  return call;
}

}  // namespace jax_flash::decode
