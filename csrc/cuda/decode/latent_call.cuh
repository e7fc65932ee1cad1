// Decode over latent pools (multi-head latent attention): the parameters of its kernels, and which rows they
// work on.
//
// Many query heads read one KV head, so the query rows of a sequence fill several tiles. The partition
// therefore divides entries instead of sequences; an entry is a chunk of the rows of one sequence. These
// kernels attend to all rows of a sequence, however many there are.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/families/latent_layout.h"
#include "cuda/decode/partition.cuh"
#include "cuda/decode/results.cuh"
#include "cuda/ptx/math.cuh"

namespace jax_flash::decode {

struct LatentCall : DecodeCall {  // `sequences` counts the entries of all leading entries
  Divisor entries;                // entries per leading entry
  Divisor head_chunks;            // chunks of the heads of a token
  Divisor token_chunks;           // chunks of the tokens of a sequence, unless packed
  int32_t chunk_tokens;
};

// The call for outer entry `outer`, with chunks of at most `rows` query rows. starts: query_starts() of
// packed sequences, else null.
template <int kTile>
LatentCall make_latent_call(const Problem& p, const DecodeGrid& grid, int32_t rows, int64_t outer,
                            const int32_t* starts, void* workspace) {
  LatentCall call{make_call<kTile>(p, grid, rows, outer, workspace), {}, {}, {}, 0};
  const latent::Chunks chunks(p.heads / p.kv_heads, rows);
  const int64_t of_sequence = ceil_div(p.q_rows, chunks.tokens);
  const int64_t entries =
      (p.packed() ? slot_count(p.q_rows, chunks.tokens, p.batch) : p.batch * of_sequence) * chunks.heads;
  const int64_t leading = p.leading.rank > 0 ? p.leading.size[p.leading.rank - 1] : 1;
  if (starts) {
    const int64_t apart = 2 * (int64_t{p.batch} + 2);
    call.starts = {const_cast<int32_t*>(starts + outer * leading * apart), apart, 1};
  }
  if (!p.paged()) call.page_size = Divisor(std::max(1, p.k_rows));
  call.sequences = static_cast<int32_t>(leading * entries);
  call.end_tiles = end_tiles(grid, call.sequences);
  call.entries = Divisor(std::max<int64_t>(1, entries));
  call.head_chunks = Divisor(chunks.heads);
  call.token_chunks = Divisor(of_sequence);
  call.chunk_tokens = chunks.tokens;
  call.lists = decode_lists(call, kTile, p.kv_heads, 1);
  return call;
}

// launch_decode_lists() for entries of at most `rows` query rows, 16 or 64.
cudaError_t launch_latent_lists(const LatentCall& call, int32_t rows, int32_t tile, cudaStream_t stream);

// The entries of one KV head, as Rows of partition.cuh. kOptions: for kernels with score options, which skip
// tiles that ranges or a block mask hide from all rows.
template <int kRows, bool kOptions>
struct LatentColumn {
  static constexpr bool kSkips = kOptions;
  const LatentCall& call;
  int32_t kv_head;

  // The number of a sequence, and its entry's rows, counted from the first row of the KV head.
  struct Entry {
    int32_t sequence, first, end;
  };
  __device__ __forceinline__ Entry entry(int32_t number) const {
    const int32_t leading = call.entries.quotient(number);
    const int32_t rest = number - leading * call.entries.value;
    const int32_t chunk = call.head_chunks.quotient(rest);
    const int32_t part = rest - chunk * call.head_chunks.value;
    int32_t index, token, tokens = call.q_rows;
    if (call.starts) {
      const int32_t* const starts = call.starts.at<const int32_t>(leading, 0, 0, 0);
      index = sequence_of_slot(starts, call.batch.value, call.chunk_tokens, chunk);
      token = static_cast<int32_t>(chunk - first_slot(starts[index], call.chunk_tokens, index)) *
              call.chunk_tokens;
      tokens = starts[index + 1] - starts[index];
      if (token < 0 || token >= tokens) return {leading * call.batch.value + index, 0, 0};
    } else {
      index = call.token_chunks.quotient(chunk);
      token = (chunk - index * call.token_chunks.value) * call.chunk_tokens;
    }
    const int32_t first = token * call.group.value + part * kRows;
    const int32_t all = min(tokens, token + call.chunk_tokens) * call.group.value;
    return {leading * call.batch.value + index, first, min(all, first + kRows)};
  }
  __device__ __forceinline__ ColumnRows rows(const Entry& entry) const {
    return {call.group, kv_head, entry.first, entry.end};
  }
  __device__ __forceinline__ SequenceWork sequence(const DecodeCall&, int32_t number) const {
    const Entry found = entry(number);
    if (found.first >= found.end) {  // there is no such entry
      SequenceWork none{};
      none.leave();
      return none;
    }
    SequenceWork work(call, rows(found), found.sequence);
    if (kOptions && call.lists) {
      work.take_list(call, call.lists.number(kv_head, 0, number));
    } else if (kOptions && call.ranges) {
      work.keys = seen_by_column(call, rows(found), work).any;
    }
    return work;
  }
};

// Writes o = 0 and lse = −∞ to the packed tokens outside every sequence. All CTAs of the grid take part.
template <class T, int kThreads>
__device__ __forceinline__ void clear_outside(const LatentCall& call) {
  if (!call.starts) return;
  const int32_t heads = call.columns.value * call.group.value, batch = call.batch.value;
  constexpr int64_t kWarps = kThreads / 32;
  const int64_t blocks = int64_t{call.columns.value} * call.grid.ranges;
  const int32_t lane = static_cast<int32_t>(threadIdx.x % 32);
  const int32_t leading_entries = max(1, call.sequences / call.entries.value);
#pragma unroll 1
  for (int32_t leading = 0; leading < leading_entries; ++leading) {
    const int32_t* const starts = call.starts.at<const int32_t>(leading, 0, 0, 0);
    const int32_t before = starts[0], after = starts[batch];
    const int64_t rows = int64_t{before + call.q_rows - after} * heads;
#pragma unroll 1
    for (int64_t at = blockIdx.x * kWarps + threadIdx.x / 32; at < rows; at += blocks * kWarps) {
      const int32_t outside = static_cast<int32_t>(at / heads), head = static_cast<int32_t>(at % heads);
      const int32_t token = outside < before ? outside : after + (outside - before);
      T* const to = call.out.at<T>(leading, 0, head, token);
      for (int32_t feature = 2 * lane; feature < call.value_dim; feature += 64)
        ptx::store_pair(to + feature, 0.0f, 0.0f);
      if (lane == 0) store_lse(call, leading, 0, head, token, -INFINITY);
    }
  }
}

}  // namespace jax_flash::decode
